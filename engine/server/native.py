"""LoRAX's own routes: generation, tokens, health, facts and metrics."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import msgspec
from aiohttp import web

import engine
from engine.errors import EngineDead, LoraxError
from engine.metrics import CONTENT_TYPE
from engine.server import sse
from engine.server.front import (
    FRONT,
    Front,
    headers_of,
    inference,
    observe,
    token_of,
    with_body,
)
from engine.server.generation import Generation
from engine.server.parameters import Parameters, invalid, refuse, refuse_format
from engine.server.refusals import json_response
from engine.server.refusals import native_body as error_body
from engine.server.schemas import (
    AlternativeToken,
    BestOfSequence,
    Details,
    GenerateAnswer,
    GenerateBody,
    GenerateParameters,
    OutputToken,
    PrefillToken,
    StreamAnswer,
    StreamDetails,
    TokenizeBody,
)
from engine.server.sequence import Event, Finish, PromptLogprobs, Token
from engine.server.text import Text

MAX_TOKENIZED = 1 << 20  # characters of POST /tokenize; they take some 200 MB
NAMES = {"num_alternatives": "return_k_alternatives"}


def parameters_of(
    body: GenerateBody, front: Front, api_token: str | None, *, stream: bool
) -> Parameters:
    """What `body` asks for; raises InvalidRequest for what this server does not do."""
    given = body.parameters or GenerateParameters()
    if not body.inputs:
        raise invalid("inputs", "is empty", "send some text")
    refuse(watermark=given.watermark, merged_adapters=given.merged_adapters)
    refuse_format(given.response_format)
    filters = (given.top_k, given.top_p, given.typical_p, given.min_p)
    sample = (
        bool(given.do_sample)
        or given.temperature not in (None, 0, 1)
        or any(value is not None for value in filters)
    )
    best_of = 1 if given.best_of is None else given.best_of
    if given.return_k_alternatives is not None and given.return_k_alternatives < 1:
        raise invalid("return_k_alternatives", "must be 1 or more", "leave it out for none")
    if given.seed is not None and given.seed < 0:
        raise invalid("seed", "must be 0 or more")
    if best_of > 1:
        if not sample:
            raise invalid("best_of", "above 1 needs sampling", "set `do_sample`")
        if given.seed is not None:
            raise invalid("best_of", "above 1 excludes `seed`", "leave one of them out")
        if stream:
            raise invalid("best_of", "above 1 cannot be streamed", "leave it out, or do not stream")
    if given.decoder_input_details and stream:
        raise invalid("decoder_input_details", "cannot be streamed", "leave it out")
    details = bool(given.details or given.decoder_input_details)
    return Parameters(
        adapter=front.adapter(given.adapter_id, given.adapter_source),
        api_token=api_token,
        sample=sample,
        temperature=given.temperature,
        top_k=given.top_k,
        top_p=given.top_p,
        typical_p=given.typical_p,
        min_p=given.min_p,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        presence_penalty=given.presence_penalty,
        seed=given.seed,
        max_new_tokens=given.max_new_tokens,
        stop=given.stop or (),
        keep_stop=True,
        ignore_eos=bool(given.ignore_eos_token),
        truncate=given.truncate,
        best_of=best_of,
        logprobs=stream or details or best_of > 1,
        num_alternatives=given.return_k_alternatives,
        prompt_logprobs=bool(given.decoder_input_details),
        names=NAMES,
    )


@dataclass(slots=True)
class _Answer:
    """One finished choice of an answer that is not streamed."""

    finish: Finish
    prefill: list[PrefillToken] = field(default_factory=list)
    tokens: list[OutputToken] = field(default_factory=list)


@inference(GenerateBody)
async def generate(request: web.Request, body: GenerateBody) -> web.StreamResponse:
    """POST /generate."""
    return await _generate(request, body, stream=False)


@inference(GenerateBody)
async def generate_stream(request: web.Request, body: GenerateBody) -> web.StreamResponse:
    """POST /generate_stream."""
    return await _generate(request, body, stream=True)


@inference(GenerateBody)
async def compatible(request: web.Request, body: GenerateBody) -> web.StreamResponse:
    """POST / and /invocations: streamed if `stream` says so, else a list of one answer."""
    return await _generate(request, body, stream=None)


async def _generate(
    request: web.Request, body: GenerateBody, *, stream: bool | None
) -> web.StreamResponse:
    front = request.app[FRONT]
    streamed = bool(body.stream) if stream is None else stream
    given = body.parameters or GenerateParameters()
    token = token_of(request, given.api_token)
    parameters = parameters_of(body, front, token, stream=streamed)
    before = body.inputs if given.return_full_text else ""
    async with front.generator.open([body.inputs], parameters) as generation:
        headers = headers_of(front, generation)
        headers["x-compute-characters"] = str(len(body.inputs))
        if streamed:
            lines = _Lines(front.text, generation, before, bool(given.details))
            return await sse.respond(request, generation, headers, lines.encode, bytes, _fail_event)
        answer = await _collect(front.text, generation, before, given)
        observe(front, generation)
        headers |= _times(generation)
    return json_response([answer] if stream is None else answer, headers=headers)


async def _collect(
    text: Text, generation: Generation, before: str, given: GenerateParameters
) -> GenerateAnswer:
    """Waits for every choice; the winner is the one with the highest mean log-probability."""
    tokens: dict[int, list[OutputToken]] = {}
    prefill: dict[int, list[PrefillToken]] = {}
    while (events := await generation.next()) is not None:
        for event in events:
            if isinstance(event, Token):
                tokens.setdefault(event.choice, []).append(_token(text, event))
            elif isinstance(event, PromptLogprobs):
                prompt = generation.prompt_of(event.choice)
                prefill[event.choice] = _prefill(text, prompt, event.logprobs)
    best, *others = sorted(
        generation.finished.values(), key=lambda finish: (-finish.mean_logprob, finish.choice)
    )
    answer = GenerateAnswer(before + best.text)
    if given.details or given.decoder_input_details:
        answer.details = Details(
            finish_reason=best.reason,
            prompt_tokens=generation.prompt_tokens,
            generated_tokens=best.usage.generated_tokens,
            skipped_tokens=0,
            seed=best.seed,
            prefill=prefill.get(best.choice, []),
            tokens=tokens.get(best.choice, []),
        )
        if others:
            answer.details.best_of_sequences = [
                BestOfSequence(
                    generated_text=before + other.text,
                    finish_reason=other.reason,
                    generated_tokens=other.usage.generated_tokens,
                    seed=other.seed,
                    prefill=prefill.get(other.choice, []),
                    tokens=tokens.get(other.choice, []),
                )
                for other in others
            ]
    return answer


def _token(text: Text, token: Token) -> OutputToken:
    """As LoRAX shows it. The texts of all tokens that are not special are the answer: a special token that brings
    text, because it ended an incomplete character, is shown as that text."""
    special = token.special and not token.delta
    shown = OutputToken(token.id, token.text if special else token.delta, token.logprob, special)
    if token.alternatives is not None:
        shown.alternative_tokens = [
            AlternativeToken(id, text.token_text(id), logprob) for id, logprob in token.alternatives
        ]
    return shown


def _prefill(text: Text, prompt: Sequence[int], logprobs: list[float]) -> list[PrefillToken]:
    with_first: list[float | None] = [None, *logprobs]
    return [
        PrefillToken(id, text.token_text(id), logprob)
        for id, logprob in zip(prompt, with_first, strict=False)
    ]


class _Lines:
    """The events of a native stream, as bytes. The last token's event carries the whole text and the details."""

    def __init__(self, text: Text, generation: Generation, before: str, details: bool) -> None:
        self._text = text
        self._generation = generation
        self._before = before
        self._details = details
        self._encode = msgspec.json.Encoder().encode

    def encode(self, events: list[Event]) -> bytes:
        answers: list[StreamAnswer] = []
        for event in events:
            if isinstance(event, Token):
                answers.append(StreamAnswer(_token(self._text, event)))
            elif isinstance(event, Finish):
                if not answers or event.delta:  # the end came alone: it needs a token to ride on
                    answers.append(StreamAnswer(OutputToken(0, event.delta, None, not event.delta)))
                answers[-1].generated_text = self._before + event.text
                if self._details:
                    answers[-1].details = StreamDetails(
                        event.reason,
                        self._generation.prompt_tokens,
                        event.usage.generated_tokens,
                        event.seed,
                    )
        return b"".join([b"data:" + self._encode(answer) + b"\n\n" for answer in answers])


def _fail_event(error: LoraxError) -> bytes:
    return b"data:" + msgspec.json.encode(error_body(error)) + b"\n\n"


def _times(generation: Generation) -> dict[str, str]:
    """Whole milliseconds, as LoRAX; per-token times with three decimals."""
    timings = generation.timings
    now = time.monotonic()
    admitted = timings.admitted or timings.validated
    finished = timings.finished or now
    first = timings.first_token or finished
    count = generation.generated_tokens

    def ms(seconds: float) -> str:
        return str(round(max(0.0, seconds) * 1000))

    def fine(seconds: float) -> str:
        return f"{max(0.0, seconds) * 1000:.3f}"

    return {
        "x-compute-time": ms(now - timings.received),
        "x-total-time": ms(now - timings.received),
        "x-validation-time": ms(timings.validated - timings.received),
        "x-queue-time": ms(admitted - timings.validated),
        "x-inference-time": ms(finished - admitted),
        "x-time-per-token": fine((finished - admitted) / max(1, count)),
        "x-time-to-first-token": fine(first - admitted),
        "x-time-per-output-token": fine((finished - first) / max(1, count - 1)),
        "x-prompt-tokens": str(generation.prompt_tokens),
        "x-generated-tokens": str(count),
        "x-skipped-tokens": "0",
        "x-total-tokens": str(generation.prompt_tokens + count),
    }


@with_body(TokenizeBody)
async def tokenize(request: web.Request, body: TokenizeBody) -> web.StreamResponse:
    """POST /tokenize."""
    special = body.add_special_tokens is not False
    if len(body.inputs) > MAX_TOKENIZED:
        raise invalid("inputs", f"has more than {MAX_TOKENIZED} characters", "send it in parts")
    return json_response(await request.app[FRONT].text.tokenize(body.inputs, special=special))


async def health(request: web.Request) -> web.StreamResponse:
    """GET /health, /ping and /: is the engine alive. While adapters cannot be loaded it says so, with status 200:
    the base model and adapters in use are served."""
    backend = request.app[FRONT].backend
    if not backend.alive:
        return json_response({"error": "unhealthy", "error_type": "healthcheck"}, status=503)
    if backend.exchange_away:
        return json_response({"status": "degraded", "adapter_exchange": "restarting"})
    return web.Response()


async def startup(request: web.Request) -> web.StreamResponse:
    """GET /startup: does the engine really generate a token."""
    front = request.app[FRONT]
    if not front.backend.alive:
        raise EngineDead("the engine is gone")
    parameters = Parameters(max_new_tokens=1)
    async with front.generator.open([[front.text.first_token]], parameters) as generation:
        while await generation.next() is not None:
            pass
    return web.Response()


async def info(request: web.Request) -> web.StreamResponse:
    """GET /info: LoRAX's fields, then ours."""
    front = request.app[FRONT]
    about, config, stats = front.backend.info, front.config, front.backend.stats
    lorax = {
        "model_id": about.model_id,
        "model_sha": about.revision,
        "model_dtype": about.dtype,
        "model_device_type": about.device,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": config.server.max_concurrent_requests,
        "max_best_of": config.server.max_best_of,
        "max_stop_sequences": config.server.max_stop_sequences,
        "max_input_length": about.max_input_length,
        "max_total_tokens": about.max_total_tokens,
        "waiting_served_ratio": 0.0,  # nothing waits for a batch to fill
        "max_batch_total_tokens": about.max_batch_total_tokens,
        "max_waiting_tokens": 0,
        "validation_workers": 1,
        "eager_prefill": True,
        "version": engine.__version__,
    }
    ours = {
        "model_type": about.model_type,
        "quantize": about.quantize,
        "device_name": about.device_name,
        "vocab_size": about.vocab_size,
        "max_batch_size": about.max_batch_size,
        "max_step_tokens": about.max_step_tokens,
        "max_num_alternatives": config.server.max_num_alternatives,
        "block_size": about.block_size,
        "adapter_bytes": about.adapter_bytes,
        "host_bytes": about.host_bytes,
        "backends": about.backends,
        "memory_plan": dict(about.memory_plan),
        "targets": about.targets,
        "chat_template": front.text.has_chat_template,
        "adapters_resident": [
            {"name": name, "digest": digest.hex(), "bytes": size}
            for name, digest, size in stats.resident
        ],
        "waiting": stats.waiting,
        "running": stats.running,
    }
    return json_response(lorax | ours)


async def metrics(request: web.Request) -> web.StreamResponse:
    """GET /metrics: Prometheus text, or JSON if asked for."""
    front = request.app[FRONT]
    backend = front.backend
    adapters = await backend.adapters() if backend.alive else []
    as_json = request.query.get("format") == "json"
    levels = (backend.stats, adapters, backend.info.block_size, backend.exchange_restarts)
    if as_json or "application/json" in request.headers.get("Accept", ""):
        return json_response(front.metrics.render_json(*levels))
    text = front.metrics.render(*levels)
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


def routes() -> list[web.RouteDef]:
    return [
        web.post("/", compatible),
        web.post("/invocations", compatible),
        web.post("/generate", generate),
        web.post("/generate_stream", generate_stream),
        web.post("/tokenize", tokenize),
        web.get("/", health),
        web.get("/health", health),
        web.get("/ping", health),
        web.get("/startup", startup),
        web.get("/info", info),
        web.get("/metrics", metrics),
    ]
