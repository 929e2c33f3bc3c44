"""OpenAI's bodies, parsed; refuses by name what this server does not support."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

from engine.adapters.ref import AdapterRef
from engine.server.decoding import decode
from engine.server.formats import Context, GenerationRequest
from engine.server.grammars import grammar_of, guided
from engine.server.openai.chat import ChatFormatter
from engine.server.openai.format import CompletionFormatter
from engine.server.openai.messages import conversation
from engine.server.openai.schemas import ChatBody, CompletionBody, OpenAIBody
from engine.server.openai.unserved import refuse_unserved
from engine.server.parameters import Parameters, invalid, refuse
from engine.server.prompts import Prompt
from engine.server.token_rules import biases_of


def parse_chat(raw: bytes | bytearray, context: Context, /) -> GenerationRequest:
    """Of /v1/chat/completions. See `Parser`."""
    body = decode(raw, ChatBody)
    return GenerationRequest(
        parameters=chat_parameters(body, context),
        prompts=[conversation(body)],
        formatter=partial(ChatFormatter, body, body.model or context.model_id),
        stream=bool(body.stream),
        id=f"chatcmpl-{uuid.uuid4().hex}",
    )


def parse_completion(raw: bytes | bytearray, context: Context, /) -> GenerationRequest:
    """Of /v1/completions. See `Parser`."""
    body = decode(raw, CompletionBody)
    parameters, prompts = _completion_parameters(body, context), _prompts(body.prompt)
    model = body.model or context.model_id
    return GenerationRequest(
        parameters=parameters,
        prompts=prompts,
        formatter=partial(CompletionFormatter, body, model, prompts),
        stream=bool(body.stream),
        id=f"cmpl-{uuid.uuid4().hex}",
    )


def _parameters(
    body: OpenAIBody, context: Context, api_token: str | None, names: dict[str, str], **own: Any
) -> Parameters:
    """The parameters of both formats, and `own` of one. Without a temperature OpenAI samples at 1."""
    refuse_unserved(body)
    structured = guided(
        body.structured_outputs,
        body.guided_json,
        body.guided_regex,
        body.guided_choice,
        body.guided_grammar,
    )
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "needs `stream`", "leave it out, or set `stream`")
    stop = [body.stop] if isinstance(body.stop, str) and body.stop else body.stop
    shared: dict[str, Any] = {
        "adapter": _adapter(body, context),
        "api_token": api_token,
        "cache_salt": body.cache_salt,
        "priority": body.priority,
        "sample": True,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "typical_p": body.typical_p,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "seed": body.seed,
        "max_new_tokens": body.max_tokens,
        "min_new_tokens": body.min_tokens,
        "stop": stop or (),
        "stop_token_ids": body.stop_token_ids or (),
        "logit_bias": biases_of(body.logit_bias),
        "truncate": body.truncate_prompt_tokens,
        "keep_stop": bool(body.include_stop_str_in_output),
        "ignore_eos": bool(body.ignore_eos_token or body.ignore_eos),
        "grammar": grammar_of(body.response_format, structured),
        "names": {"min_new_tokens": "min_tokens", "truncate": "truncate_prompt_tokens"}
        | {"grammar": "response_format" if structured is None else "structured_outputs"}
        | names,
    }
    return Parameters(**shared | own)


def _adapter(body: OpenAIBody, context: Context) -> AdapterRef | None:
    """The adapter that `model` names, or LoRAX's field `adapter_id`. Raises InvalidRequest if they differ."""
    source, merged = body.adapter_source, body.merged_adapters
    if not body.adapter_id:
        return context.adapter(body.model, source, merged, field="model")
    found = context.adapter(body.adapter_id, source, merged)
    named = context.adapter(body.model, source, field="model") if body.model else None
    if named is not None and named != found:
        raise invalid("adapter_id", "and `model` name two adapters", "leave one out")
    return found


def chat_parameters(body: ChatBody, context: Context) -> Parameters:
    """The parameters of a chat completion. Raises InvalidRequest."""
    api_token = context.token(body.api_token)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "needs `logprobs`", "set `logprobs` to true")
    names = {"inputs": "messages", "num_alternatives": "top_logprobs", "best_of": "n"}
    newer = body.max_completion_tokens is not None
    names["max_new_tokens"] = "max_completion_tokens" if newer else "max_tokens"
    return _parameters(
        body,
        context,
        api_token,
        names,
        max_new_tokens=_first(body.max_completion_tokens, body.max_tokens),
        best_of=_first(body.n, 1),
        logprobs=bool(body.logprobs),
        num_alternatives=body.top_logprobs,
    )


def _completion_parameters(body: CompletionBody, context: Context) -> Parameters:
    api_token = context.token(body.api_token)
    refuse(suffix=body.suffix)
    n = _first(body.n, 1)
    best_of = _first(body.best_of, n)
    if best_of < n:
        raise invalid("best_of", f"must be at least `n`, which is {n}, not {best_of}")
    if best_of > n and body.stream:
        raise invalid("best_of", "above `n` cannot be streamed", "leave it out, or do not stream")
    names = {"inputs": "prompt", "num_alternatives": "logprobs", "max_new_tokens": "max_tokens"}
    names["best_of"] = "n" if body.best_of is None else "best_of"
    score_only = body.max_tokens == 0 and bool(body.echo)
    default = context.config.server.completion_max_tokens
    return _parameters(
        body,
        context,
        api_token,
        names,
        best_of=best_of,
        logprobs=body.logprobs is not None or best_of > n,
        num_alternatives=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
        score_only=score_only,
        max_new_tokens=1 if score_only else _first(body.max_tokens, default),
    )


def _first(value: int | None, default: Any) -> Any:
    return default if value is None else value


def _prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """One prompt or several; each is a text or a list of tokens."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", "is empty", "send at least one prompt")
    if all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    if all(isinstance(item, str) for item in prompt) or all(isinstance(i, list) for i in prompt):
        return [item for item in prompt if not isinstance(item, int)]
    raise invalid("prompt", "mixes texts and tokens", "send only texts, or only lists of tokens")
