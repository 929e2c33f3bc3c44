"""`litellm`: its providers for OpenAI, vLLM, Hugging Face and Anthropic, each against this server."""

from __future__ import annotations

import os
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # no download

import litellm
import pytest

from tests.conformance.wire import CITY, MESSAGES, PROMPT, TOOLS, Server, is_weather

FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "stay", "schema": CITY}}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}
PROVIDERS = ["openai", "hosted_vllm", "huggingface", "anthropic"]
WITH_SCHEMAS = [
    "openai",
    "huggingface",
    "anthropic",
]  # hosted_vllm leaves parts of a tool's schema out
NOW: Any = {"type": "function", "function": {"name": "now", "parameters": None}}


def given(server: Server, provider: str, model: str = "base") -> dict[str, Any]:
    """Arguments of a call with a provider: where the server is, and greedy answers."""
    base = (
        server.v1 if provider in ("openai", "hosted_vllm", "text-completion-openai") else server.url
    )
    where: dict[str, Any] = {"api_base": base, "api_key": server.key, "max_retries": 0}
    return {"model": f"{provider}/{model}", "temperature": 0, "max_tokens": 24} | where


def joined(chunks: Any) -> str:
    return "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)


@pytest.mark.parametrize("model", ["base", "pirate"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_completion(server: Server, provider: str, model: str) -> None:
    answer = litellm.completion(messages=MESSAGES, **given(server, provider, model))
    assert answer.choices[0].message.content == server.says(model)
    usage = server.chat(model)["usage"]
    assert answer.usage.prompt_tokens == usage["prompt_tokens"]
    assert answer.usage.completion_tokens == usage["completion_tokens"]


@pytest.mark.parametrize("model", ["base", "pirate"])
@pytest.mark.parametrize("provider", PROVIDERS)
def test_stream(server: Server, provider: str, model: str) -> None:
    chunks = list(
        litellm.completion(messages=MESSAGES, stream=True, **given(server, provider, model))
    )
    assert joined(chunks) == server.says(model) and len(chunks) > 3
    assert chunks[-1].choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize("provider", PROVIDERS)
async def test_asyncio(server: Server, provider: str) -> None:
    call = given(server, provider)
    answer = await litellm.acompletion(messages=MESSAGES, **call)
    stream = await litellm.acompletion(messages=MESSAGES, stream=True, **call)
    chunks = [chunk async for chunk in stream]
    assert answer.choices[0].message.content == joined(chunks) == server.says()


@pytest.mark.parametrize("provider", WITH_SCHEMAS)
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_tools(server: Server, provider: str, choice: Any) -> None:
    call = given(server, provider) | {"max_tokens": 120}
    answer = litellm.completion(messages=MESSAGES, tools=TOOLS[:1], tool_choice=choice, **call)
    assert answer.choices[0].finish_reason == "tool_calls"
    made = answer.choices[0].message.tool_calls[0]
    assert made.function.name == "weather" and is_weather(made.function.arguments)


def test_a_tool_without_parameters(server: Server) -> None:
    call = given(server, "hosted_vllm") | {"max_tokens": 120}
    answer = litellm.completion(messages=MESSAGES, tools=[NOW], tool_choice="required", **call)
    made = answer.choices[0].message.tool_calls[0]
    assert (made.function.name, made.function.arguments) == ("now", "{}")


@pytest.mark.parametrize("provider", WITH_SCHEMAS)
def test_tools_of_a_stream(server: Server, provider: str) -> None:
    call = given(server, provider) | {"max_tokens": 120, "tools": TOOLS, "tool_choice": NAMED}
    whole = litellm.completion(messages=MESSAGES, **call)
    chunks = list(litellm.completion(messages=MESSAGES, stream=True, **call))
    built: Any = litellm.stream_chunk_builder(chunks, messages=MESSAGES)
    made, same = (
        [(one.function.name, one.function.arguments) for one in it.choices[0].message.tool_calls]
        for it in (built, whole)
    )
    assert [name for name, _ in made] == [name for name, _ in same]
    assert all(is_weather(arguments) for _, arguments in made)


@pytest.mark.parametrize("provider", ["openai", "hosted_vllm", "huggingface"])
def test_format(server: Server, provider: str) -> None:
    call = given(server, provider) | {"max_tokens": 60}
    answer = litellm.completion(messages=MESSAGES, response_format=FORMAT, **call)
    assert is_weather(answer.choices[0].message.content)


def test_results_go_back_to_the_model(server: Server) -> None:
    call = given(server, "openai") | {"max_tokens": 120, "tools": TOOLS}
    asked = litellm.completion(messages=MESSAGES, tool_choice=NAMED, **call)
    said = asked.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": one.id, "content": "It rains."} for one in said.tool_calls
    ]
    answer = litellm.completion(messages=[*MESSAGES, said, *results], **call)
    assert answer.usage.prompt_tokens > asked.usage.prompt_tokens + 10


def test_usage_of_a_stream(server: Server) -> None:
    options = {"include_usage": True}
    *_, last = litellm.completion(
        messages=MESSAGES, stream=True, stream_options=options, **given(server, "openai")
    )
    assert last.usage.completion_tokens == server.chat()["usage"]["completion_tokens"]


def test_text_completion(server: Server) -> None:
    call = given(server, "text-completion-openai", "pirate")
    answer = litellm.text_completion(prompt=PROMPT, **call)
    chunks = litellm.text_completion(prompt=PROMPT, stream=True, **call)
    text = "".join(one.choices[0].text or "" for one in chunks)
    assert answer.choices[0].text == text == server.completes("pirate")


def test_own_parameters(server: Server) -> None:
    call = given(server, "openai") | {"temperature": 1, "extra_body": {"top_k": 1}}
    answer = litellm.completion(messages=MESSAGES, **call)
    assert answer.choices[0].message.content == server.says()


def test_seed_and_n(server: Server) -> None:
    call = given(server, "openai") | {"temperature": 1.3, "seed": 3, "n": 3}
    answers = [litellm.completion(messages=MESSAGES, **call) for _ in range(2)]
    texts = [[one.message.content for one in answer.choices] for answer in answers]
    assert texts[0] == texts[1] and len(set(texts[0])) > 1


def test_responses(server: Server) -> None:
    call = given(server, "openai")
    call["max_output_tokens"] = call.pop("max_tokens")
    answer = litellm.responses(input=PROMPT, **call)
    assert answer.output[0].content[0].text == server.says()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"temperature": -1}, litellm.BadRequestError),
        ({"api_key": "sk-wrong"}, litellm.AuthenticationError),
        ({"model": "zebra"}, litellm.NotFoundError),
    ],
    ids=["bad", "key", "model"],
)
def test_errors(server: Server, provider: str, changed: Any, error: type[Exception]) -> None:
    if "model" in changed:
        changed = {"model": f"{provider}/zebra"}
        error = litellm.APIError if provider == "huggingface" else error  # it has no other
    with pytest.raises(error):
        litellm.completion(messages=MESSAGES, **given(server, provider) | changed)


def test_prompt_that_is_too_long(server: Server) -> None:
    long = [{"role": "user", "content": "word " * 2000}]
    with pytest.raises(litellm.BadRequestError):
        litellm.completion(messages=long, **given(server, "openai"))
