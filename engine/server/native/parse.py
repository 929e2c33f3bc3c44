"""LoRAX's generation bodies, parsed; refuses by name what this server does not support."""

from __future__ import annotations

from functools import partial

from engine.server.decoding import decode
from engine.server.formats import Context, GenerationRequest
from engine.server.grammars import grammar_of
from engine.server.native.format import NativeFormatter
from engine.server.native.schemas import GenerateBody, GenerateParameters
from engine.server.parameters import Parameters, invalid, refuse

NAMES = {"num_alternatives": "return_k_alternatives"}


def parse(raw: bytes | bytearray, context: Context, /, *, stream: bool | None) -> GenerationRequest:
    """See `Parser`. With `stream` None the body says whether to stream, and an answer is a list of one."""
    body = decode(raw, GenerateBody)
    given = body.parameters or GenerateParameters()
    streamed = bool(body.stream) if stream is None else stream
    return GenerationRequest(
        prompts=[body.inputs],
        parameters=_parameters(body, given, context, stream=streamed),
        formatter=partial(
            NativeFormatter,
            given,
            before=body.inputs if given.return_full_text else "",
            in_list=stream is None,
        ),
        stream=streamed,
        headers={"x-compute-characters": str(len(body.inputs))},
    )


def _parameters(
    body: GenerateBody, given: GenerateParameters, context: Context, *, stream: bool
) -> Parameters:
    api_token = context.token(given.api_token)
    if not body.inputs:
        raise invalid("inputs", "is empty", "send some text")
    refuse(top_n_tokens=given.top_n_tokens)
    grammar, grammar_field = _grammar(given)
    filters = (
        given.top_k not in (None, 0, -1),
        given.top_p not in (None, 1),
        given.typical_p not in (None, 1),
        given.min_p not in (None, 0),
    )
    sample = bool(given.do_sample) or given.temperature not in (None, 0, 1) or any(filters)
    best_of = 1 if given.best_of is None else given.best_of
    _check(given, best_of, sample=sample, stream=stream)
    details = bool(given.details or given.decoder_input_details)
    return Parameters(
        adapter=context.adapter(given.adapter_id, given.adapter_source, given.merged_adapters),
        api_token=api_token,
        cache_salt=given.cache_salt,
        priority=given.priority,
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
        min_new_tokens=given.min_new_tokens,
        watermark=bool(given.watermark),
        stop=given.stop or (),
        keep_stop=True,
        ignore_eos=bool(given.ignore_eos_token),
        truncate=given.truncate,
        grammar=grammar,
        best_of=best_of,
        logprobs=stream or details or best_of > 1,
        num_alternatives=given.return_k_alternatives,
        prompt_logprobs=bool(given.decoder_input_details),
        names=NAMES | {"grammar": grammar_field},
    )


def _grammar(given: GenerateParameters) -> tuple[str | None, str]:
    """The grammar, and its field: LoRAX's, or TGI's."""
    made = grammar_of(given.response_format)
    if given.grammar is None:
        return made, "response_format"
    if made is not None:
        raise invalid("grammar", "cannot be combined with `response_format`", "leave one out")
    return grammar_of(given.grammar, name="grammar"), "grammar"


def _check(given: GenerateParameters, best_of: int, *, sample: bool, stream: bool) -> None:
    """Limits of LoRAX's own; raises InvalidRequest."""
    if given.return_k_alternatives is not None and given.return_k_alternatives < 1:
        raise invalid("return_k_alternatives", "must be 1 or more", "leave it out for none")
    if given.seed is not None and given.seed < 0:
        raise invalid("seed", "must be 0 or more")
    if best_of > 1:
        if not sample:
            raise invalid("best_of", "above 1 needs sampling", "set `do_sample`")
        if given.seed is not None:
            raise invalid("best_of", "above 1 cannot be combined with `seed`", "leave one out")
        if stream:
            raise invalid("best_of", "above 1 cannot be streamed", "leave it out, or do not stream")
    if given.decoder_input_details and stream:
        raise invalid("decoder_input_details", "cannot be streamed", "leave it out")
