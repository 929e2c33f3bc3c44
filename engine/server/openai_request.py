"""What OpenAI's routes accept, as `Parameters` and prompts; refuses by name what this server does not do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from engine.server.front import Front
from engine.server.generation import Prompt
from engine.server.parameters import Parameters, invalid, refuse, refuse_format
from engine.server.schemas import ChatBody, CompletionBody, Message, OpenAIBody


def _parameters(
    body: OpenAIBody, front: Front, api_token: str | None, names: dict[str, str], **own: Any
) -> Parameters:
    """What both routes share; `own` is the route's. Without a temperature OpenAI samples at 1."""
    refuse(logit_bias=body.logit_bias)
    refuse_format(body.response_format)
    if body.stream_options is not None and not body.stream:
        raise invalid("stream_options", "needs `stream`", "leave it out, or set `stream`")
    stop = [body.stop] if isinstance(body.stop, str) else body.stop
    shared: dict[str, Any] = {
        "adapter": front.adapter(body.model, body.adapter_source),
        "api_token": api_token,
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
        "stop": stop or (),
        "ignore_eos": bool(body.ignore_eos_token),
        "names": names,
    }
    return Parameters(**shared | own)


def chat_parameters(body: ChatBody, front: Front, api_token: str | None) -> Parameters:
    """Of /v1/chat/completions; raises InvalidRequest."""
    refuse(tools=body.tools, functions=body.functions)
    if body.top_logprobs is not None and not body.logprobs:
        raise invalid("top_logprobs", "needs `logprobs`", "set `logprobs` to true")
    names = {"inputs": "messages", "num_alternatives": "top_logprobs", "best_of": "n"}
    newer = body.max_completion_tokens is not None
    names["max_new_tokens"] = "max_completion_tokens" if newer else "max_tokens"
    return _parameters(
        body,
        front,
        api_token,
        names,
        max_new_tokens=first(body.max_completion_tokens, body.max_tokens),
        best_of=first(body.n, 1),
        logprobs=bool(body.logprobs),
        num_alternatives=body.top_logprobs,
    )


def completion_parameters(body: CompletionBody, front: Front, api_token: str | None) -> Parameters:
    """Of /v1/completions; raises InvalidRequest."""
    refuse(suffix=body.suffix)
    n = first(body.n, 1)
    best_of = first(body.best_of, n)
    if best_of < n:
        raise invalid("best_of", f"must be at least `n`, which is {n}, not {best_of}")
    if best_of > n and body.stream:
        raise invalid("best_of", "above `n` cannot be streamed", "leave it out, or do not stream")
    names = {"inputs": "prompt", "num_alternatives": "logprobs", "max_new_tokens": "max_tokens"}
    names["best_of"] = "n" if body.best_of is None else "best_of"
    return _parameters(
        body,
        front,
        api_token,
        names,
        best_of=best_of,
        logprobs=body.logprobs is not None or best_of > n,
        num_alternatives=body.logprobs,
        prompt_logprobs=bool(body.echo) and body.logprobs is not None,
    )


def first(value: int | None, default: Any) -> Any:
    return default if value is None else value


def conversation(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """For the chat template: parts of type text are joined, what is not given is left out."""
    if not messages:
        raise invalid("messages", "is empty", "send at least one message")
    return [_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _message(message: Message, where: str) -> dict[str, Any]:
    content = message.content
    if isinstance(content, list):
        for index, part in enumerate(content):
            if part.type != "text":
                raise invalid(
                    f"{where}.content[{index}].type",
                    f"{part.type!r} is not supported by this server",
                    "send parts of type text only",
                )
            if part.text is None:
                raise invalid(f"{where}.content[{index}].text", "is required")
        content = "".join(part.text or "" for part in content)
    if content is None and not message.tool_calls:
        raise invalid(f"{where}.content", "is required")
    made: dict[str, Any] = msgspec.to_builtins(message)
    return made if content is None else made | {"content": content}


def prompts(prompt: str | list[str | int | list[int]]) -> list[Prompt]:
    """One prompt or several, each text or tokens."""
    if isinstance(prompt, str):
        return [prompt]
    if not prompt:
        raise invalid("prompt", "is empty", "send at least one prompt")
    if all(isinstance(item, int) for item in prompt):
        return [[item for item in prompt if isinstance(item, int)]]
    if all(isinstance(item, str) for item in prompt) or all(isinstance(i, list) for i in prompt):
        return [item for item in prompt if not isinstance(item, int)]
    raise invalid("prompt", "mixes texts and tokens", "send texts only, or lists of tokens only")
