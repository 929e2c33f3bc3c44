"""OpenAI's routes: chat completions, completions, models. `model` names the base model or an adapter."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec
from aiohttp import web

import engine
from engine.errors import AdapterNotFound, LoraxError
from engine.server import logprobs, sse
from engine.server.front import (
    FRONT,
    Front,
    headers_of,
    inference,
    observe,
    token_of,
)
from engine.server.generation import Generation
from engine.server.openai_request import (
    chat_parameters,
    completion_parameters,
    conversation,
    first,
    prompts,
)
from engine.server.parameters import BASE_NAMES
from engine.server.refusals import json_response
from engine.server.refusals import openai_body as error_body
from engine.server.schemas import (
    AnswerMessage,
    CachedTokens,
    ChatBody,
    ChatChoice,
    ChatChunkChoice,
    CompletionBody,
    CompletionChoice,
    Delta,
    OpenAIAnswer,
    OpenAIBody,
    OpenAIUsage,
)
from engine.server.sequence import Event, Finish, PromptLogprobs, Token

FINGERPRINT = f"lorax-{engine.__version__}"
REASONS = {"length": "length", "eos_token": "stop", "stop_sequence": "stop"}


@dataclass(slots=True)
class _Reply:
    """What the answers of one request have in common."""

    front: Front
    generation: Generation
    object: str
    model: str
    created: int = field(default_factory=lambda: int(time.time()))

    def answer(self, choices: Any, usage: Any = msgspec.UNSET) -> OpenAIAnswer:
        return OpenAIAnswer(
            self.generation.id, self.object, self.created, self.model, FINGERPRINT, choices, usage
        )

    def usage(self) -> OpenAIUsage:
        asked, made = self.generation.prompt_tokens, self.generation.generated_tokens
        return OpenAIUsage(asked, made, asked + made, CachedTokens(self.generation.cached_tokens))


@dataclass(slots=True)
class _Choice:
    """One choice as it grows."""

    tokens: logprobs.TokenLog = field(default_factory=logprobs.TokenLog)
    prompt_logprobs: list[float] = field(default_factory=list)
    finish: Finish | None = None
    begun: bool = False  # a chunk was sent

    def add(self, event: Event) -> str:
        """The text that `event` brought."""
        if isinstance(event, Token):
            self.tokens.push(event)
            return event.delta
        if isinstance(event, PromptLogprobs):
            self.prompt_logprobs = event.logprobs
            return ""
        self.finish = event
        self.tokens.end(event)
        return event.delta


class _Stream:
    """The chunks of a stream, as bytes; `chunks` makes what one event of one choice adds."""

    def __init__(
        self,
        reply: _Reply,
        chunks: Callable[[int, _Choice, str, Finish | None], list[Any]],
        include_usage: bool,
    ) -> None:
        self._reply = reply
        self._chunks = chunks
        self._include_usage = include_usage
        self._encode = msgspec.json.Encoder().encode
        self._choices = [_Choice() for _ in range(reply.generation.num_choices)]

    def encode(self, events: list[Event]) -> bytes:
        usage = None if self._include_usage else msgspec.UNSET
        lines: list[bytes] = []
        for event in events:
            choice = self._choices[event.choice]
            delta = choice.add(event)
            for chunk in self._chunks(event.choice, choice, delta, choice.finish):
                lines += b"data: ", self._encode(self._reply.answer([chunk], usage)), b"\n\n"
        return b"".join(lines)

    def end(self) -> bytes:
        last = b""
        if self._include_usage:
            answer = self._reply.answer([], self._reply.usage())
            last = b"data: " + self._encode(answer) + b"\n\n"
        return last + b"data: [DONE]\n\n"


def _fail_event(error: LoraxError) -> bytes:
    return b"data: " + msgspec.json.encode(error_body(error)) + b"\n\n"


async def _collect(generation: Generation) -> list[_Choice]:
    choices = [_Choice() for _ in range(generation.num_choices)]
    while (events := await generation.next()) is not None:
        for event in events:
            choices[event.choice].add(event)
    return choices


# -- the routes


@inference(ChatBody)
async def chat_completions(request: web.Request, body: ChatBody) -> web.StreamResponse:
    """POST /v1/chat/completions."""
    front = request.app[FRONT]
    parameters = chat_parameters(body, front, token_of(request, body.api_token))
    prompt = conversation(body.messages)
    id = f"chatcmpl-{uuid.uuid4().hex}"
    async with front.generator.open([prompt], parameters, id) as generation:
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        reply = _Reply(front, generation, kind, _model(body, front))
        headers = headers_of(front, generation)

        def chunks(index: int, choice: _Choice, delta: str, finish: Finish | None) -> list[Any]:
            made: list[Any] = []
            if not choice.begun:
                choice.begun = True
                made.append(ChatChunkChoice(index, Delta("assistant", "")))
            ready = choice.tokens.take() if body.logprobs else []
            if delta or ready:
                found = logprobs.chat(front.text, ready) if body.logprobs else None
                made.append(ChatChunkChoice(index, Delta(content=delta), found))
            if finish is not None:
                made.append(ChatChunkChoice(index, Delta(), None, REASONS[finish.reason]))
            return made

        if body.stream:
            return await _respond(request, reply, body, headers, chunks)
        choices: list[ChatChoice] = []
        for index, choice in enumerate(await _collect(generation)):
            assert choice.finish is not None
            found = logprobs.chat(front.text, choice.tokens.take()) if body.logprobs else None
            message = AnswerMessage("assistant", choice.finish.text)
            choices.append(ChatChoice(index, message, found, REASONS[choice.finish.reason]))
        observe(front, generation)
    return json_response(reply.answer(choices, reply.usage()), headers=headers)


@inference(CompletionBody)
async def completions(request: web.Request, body: CompletionBody) -> web.StreamResponse:
    """POST /v1/completions."""
    front = request.app[FRONT]
    parameters = completion_parameters(body, front, token_of(request, body.api_token))
    asked = prompts(body.prompt)
    id = f"cmpl-{uuid.uuid4().hex}"
    async with front.generator.open(asked, parameters, id) as generation:
        reply = _Reply(front, generation, "text_completion", _model(body, front))
        headers = headers_of(front, generation)

        def before(index: int) -> str:
            """The prompt's own text, with echo."""
            if not body.echo:
                return ""
            prompt = asked[index // parameters.best_of]
            return (
                prompt
                if isinstance(prompt, str)
                else front.text.decode(generation.prompt_of(index))
            )

        def logged(index: int, choice: _Choice, *, begins: bool) -> Any:
            if body.logprobs is None:
                return None
            prompt = generation.prompt_of(index) if begins and body.echo else []
            return logprobs.completion(
                front.text,
                choice.tokens.take(),
                before(index),
                list(zip(prompt, [None, *choice.prompt_logprobs], strict=False)),
            )

        def chunks(index: int, choice: _Choice, delta: str, finish: Finish | None) -> list[Any]:
            if not choice.begun and body.echo and (delta or finish):
                delta = before(index) + delta
            if not delta and finish is None:
                return []
            begins, choice.begun = not choice.begun, True
            reason = REASONS[finish.reason] if finish else None
            return [CompletionChoice(index, delta, logged(index, choice, begins=begins), reason)]

        if body.stream:
            return await _respond(request, reply, body, headers, chunks)
        found = await _collect(generation)
        choices: list[CompletionChoice] = []
        for old in _best(found, parameters.best_of, first(body.n, 1)):
            finish = found[old].finish
            assert finish is not None
            log = logged(old, found[old], begins=True)
            text = before(old) + finish.text
            choices.append(CompletionChoice(len(choices), text, log, REASONS[finish.reason]))
        observe(front, generation)
    return json_response(reply.answer(choices, reply.usage()), headers=headers)


def _best(choices: list[_Choice], best_of: int, n: int) -> list[int]:
    """The choices to answer with: for each prompt, the `n` of `best_of` with the highest mean log-probability."""

    def mean(index: int) -> float:
        finish = choices[index].finish
        return finish.mean_logprob if finish else float("-inf")

    kept: list[int] = []
    for start in range(0, len(choices), best_of):
        group = range(start, start + best_of)
        kept += group if best_of == n else sorted(group, key=mean, reverse=True)[:n]
    return kept


async def _respond(
    request: web.Request,
    reply: _Reply,
    body: OpenAIBody,
    headers: dict[str, str],
    chunks: Callable[[int, _Choice, str, Finish | None], list[Any]],
) -> web.StreamResponse:
    include = body.stream_options is not None and bool(body.stream_options.include_usage)
    stream = _Stream(reply, chunks, include)
    return await sse.respond(
        request, reply.generation, headers, stream.encode, stream.end, _fail_event
    )


def _model(body: OpenAIBody, front: Front) -> str:
    return body.model or front.backend.info.model_id


async def _models(front: Front) -> list[dict[str, Any]]:
    base = front.backend.info.model_id
    adapters = await front.backend.adapters()
    names = dict.fromkeys(status.name for status in adapters if status.state != "failed")
    shared = {"object": "model", "created": int(front.started), "owned_by": "lorax", "root": base}
    listed = [{"id": base, **shared, "parent": None}]
    return listed + [{"id": name, **shared, "parent": base} for name in names]


async def list_models(request: web.Request) -> web.StreamResponse:
    """GET /v1/models: the base model, then every adapter that is known."""
    return json_response({"object": "list", "data": await _models(request.app[FRONT])})


async def get_model(request: web.Request) -> web.StreamResponse:
    """GET /v1/models/{id}."""
    models = await _models(request.app[FRONT])
    wanted = request.match_info["id"]
    if wanted in BASE_NAMES:
        return json_response(models[0])
    for model in models:
        if model["id"] == wanted:
            return json_response(model)
    raise AdapterNotFound(
        f"no model {wanted!r} is loaded", field="model", hint="GET /v1/models lists them"
    )


def routes() -> list[web.RouteDef]:
    return [
        web.post("/v1/chat/completions", chat_completions),
        web.post("/v1/completions", completions),
        web.get("/v1/models", list_models),
        web.get("/v1/models/{id:.+}", get_model),
    ]
