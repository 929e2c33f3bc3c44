"""`huggingface_hub`: InferenceClient on LoRAX's own routes and on the chat's, in threads and in asyncio."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator, Iterator
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient

from tests.conformance.wire import ADAPTERS, CITY, MESSAGES, PROMPT, TOOLS, Server, is_weather

GREEDY: dict[str, Any] = {"model": "base", "temperature": 0, "max_tokens": 24}
FORMAT: Any = {"type": "json_schema", "json_schema": {"name": "stay", "schema": CITY}}
CHOICE: Any = {"function": {"name": "weather"}, "type": "function"}


@pytest.fixture
def client(server: Server) -> Iterator[InferenceClient]:
    with InferenceClient(base_url=server.url, api_key=server.key) as client:
        yield client


@pytest.fixture
async def later(server: Server) -> AsyncIterator[AsyncInferenceClient]:
    async with AsyncInferenceClient(base_url=server.url, api_key=server.key) as client:
        yield client


# -- text_generation


@pytest.mark.parametrize("adapter", [None, *ADAPTERS])
def test_text(client: InferenceClient, server: Server, adapter: str | None) -> None:
    text = client.text_generation(PROMPT, adapter_id=adapter, max_new_tokens=24)
    assert text == server.generates(adapter)["generated_text"] != ""


def test_details(client: InferenceClient, server: Server) -> None:
    answer = client.text_generation(
        PROMPT, max_new_tokens=24, details=True, decoder_input_details=True
    )
    same = server.generates(decoder_input_details=True)
    details = answer.details
    assert answer.generated_text == same["generated_text"] and details is not None
    assert details.finish_reason == same["details"]["finish_reason"]
    assert details.generated_tokens == same["details"]["generated_tokens"] == len(details.tokens)
    assert [one.id for one in details.tokens] == [one["id"] for one in same["details"]["tokens"]]
    assert len(details.prefill) == server.count(PROMPT)


@pytest.mark.parametrize("adapter", [None, "pirate"])
def test_stream(client: InferenceClient, server: Server, adapter: str | None) -> None:
    pieces = list(
        client.text_generation(PROMPT, adapter_id=adapter, max_new_tokens=24, stream=True)
    )
    text = "".join(pieces)
    assert text.removesuffix("</s>") == server.generates(adapter)["generated_text"]
    assert len(pieces) > 3


def test_details_of_a_stream(client: InferenceClient) -> None:
    whole = client.text_generation(PROMPT, max_new_tokens=24, details=True)
    parts = list(client.text_generation(PROMPT, max_new_tokens=24, details=True, stream=True))
    assert [one.token.id for one in parts] == [one.id for one in whole.details.tokens]
    last = parts[-1]
    assert last.generated_text == whole.generated_text and last.details is not None
    assert last.details.generated_tokens == whole.details.generated_tokens
    assert last.details.finish_reason == whole.details.finish_reason
    assert all(one.details is None for one in parts[:-1])


def test_seed(client: InferenceClient) -> None:
    def said(seed: int) -> Any:
        given: Any = {"do_sample": True, "temperature": 1.5, "max_new_tokens": 12}
        return client.text_generation(PROMPT, seed=seed, **given)

    first = [said(seed) for seed in range(4)]
    assert [said(seed) for seed in range(4)] == first and len(set(first)) > 1


def test_stop(client: InferenceClient, server: Server) -> None:
    """The answer ends with the stop sequence."""
    whole = server.generates()["generated_text"]
    answer = client.text_generation(PROMPT, max_new_tokens=24, stop=["castle"], details=True)
    assert answer.generated_text == whole.partition("castle")[0] + "castle" != whole
    assert answer.details.finish_reason == "stop_sequence"


def test_full_text(client: InferenceClient, server: Server) -> None:
    text = client.text_generation(PROMPT, max_new_tokens=24, return_full_text=True)
    assert text == PROMPT + server.generates()["generated_text"]


def test_best_of(client: InferenceClient) -> None:
    answer = client.text_generation(
        PROMPT, max_new_tokens=8, do_sample=True, best_of=2, details=True
    )
    others = answer.details.best_of_sequences
    assert others is not None and len(others) == 1 and others[0].seed != answer.details.seed


def test_truncate(client: InferenceClient) -> None:
    answer = client.text_generation(
        PROMPT, max_new_tokens=2, truncate=3, details=True, decoder_input_details=True
    )
    assert len(answer.details.prefill) == 3


def test_filters_keep_the_greedy_text(client: InferenceClient, server: Server) -> None:
    answer = client.text_generation(
        PROMPT, max_new_tokens=24, do_sample=True, top_k=1, seed=3, details=True
    )
    assert answer.generated_text == server.generates()["generated_text"]
    assert answer.details.seed == 3


@pytest.mark.parametrize("kind", ["json", "json_object"])
def test_json_grammar(client: InferenceClient, kind: str) -> None:
    grammar: Any = {"type": kind, "value": CITY}
    text = client.text_generation(PROMPT, max_new_tokens=60, grammar=grammar)
    assert is_weather(text)


def test_regex_grammar(client: InferenceClient) -> None:
    grammar: Any = {"type": "regex", "value": "[a-f]{3}-[0-9]{2}"}
    text = client.text_generation(PROMPT, max_new_tokens=60, grammar=grammar)
    assert re.fullmatch("[a-f]{3}-[0-9]{2}", text)


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
        ({"best_of": 2}, "best_of"),
        ({"grammar": {"type": "magic", "value": "x"}}, "grammar"),
        ({"adapter_id": "zebra"}, None),
    ],
    ids=["temperature", "max_new_tokens", "best_of", "grammar", "adapter"],
)
def test_refused(client: InferenceClient, given: Any, field: str | None) -> None:
    """Errors of validation have a class of the SDK, other types none."""
    errors = huggingface_hub.errors
    kind = errors.UnknownError if field is None else errors.ValidationError
    with pytest.raises(kind, match=field or "zebra"):
        client.text_generation(PROMPT, **given)


def test_wrong_key(server: Server) -> None:
    with InferenceClient(base_url=server.url, api_key="sk-wrong") as stranger:
        with pytest.raises(huggingface_hub.errors.UnknownError, match="API key"):
            stranger.text_generation(PROMPT)
        with pytest.raises(huggingface_hub.errors.HfHubHTTPError) as refused:
            stranger.chat_completion(MESSAGES)
    assert refused.value.response.status_code == 401


# -- chat_completion


@pytest.mark.parametrize("model", ["base", *ADAPTERS])
def test_chat(client: InferenceClient, server: Server, model: str) -> None:
    answer = client.chat_completion(MESSAGES, **GREEDY | {"model": model})
    assert answer.choices[0].message.content == server.says(model)
    assert answer.model == model and answer.usage.total_tokens > 0


def test_chat_in_the_names_of_openai(client: InferenceClient, server: Server) -> None:
    answer = client.chat.completions.create(messages=MESSAGES, **GREEDY)
    assert answer.choices[0].message.content == server.says()


def test_chat_at_v1(server: Server) -> None:
    with InferenceClient(base_url=server.v1, api_key=server.key) as client:
        answer = client.chat_completion(MESSAGES, **GREEDY)
    assert answer.choices[0].message.content == server.says()


@pytest.mark.parametrize("model", ["base", "pirate"])
def test_chat_of_a_stream(client: InferenceClient, server: Server, model: str) -> None:
    chunks = list(client.chat_completion(MESSAGES, stream=True, **GREEDY | {"model": model}))
    text = "".join(one.choices[0].delta.content or "" for one in chunks)
    assert text == server.says(model) and chunks[-1].choices[0].finish_reason is not None


def test_usage_of_a_stream(client: InferenceClient) -> None:
    options: Any = {"include_usage": True}
    *_, last = client.chat_completion(MESSAGES, stream=True, stream_options=options, **GREEDY)
    whole = client.chat_completion(MESSAGES, **GREEDY).usage
    assert last.usage is not None and last.usage.total_tokens == whole.total_tokens


def test_chat_logprobs(client: InferenceClient) -> None:
    choice = client.chat_completion(MESSAGES, logprobs=True, top_logprobs=2, **GREEDY).choices[0]
    assert choice.logprobs is not None
    assert "".join(one.token for one in choice.logprobs.content).strip() == (
        choice.message.content.strip()
    )
    assert all(len(one.top_logprobs) == 2 for one in choice.logprobs.content)


def test_chat_format(client: InferenceClient) -> None:
    answer = client.chat_completion(MESSAGES, response_format=FORMAT, **GREEDY | {"max_tokens": 60})
    assert is_weather(answer.choices[0].message.content)


def test_chat_tools(client: InferenceClient) -> None:
    for choice in ("required", CHOICE):
        answer = client.chat_completion(
            MESSAGES, tools=TOOLS[:1], tool_choice=choice, **GREEDY | {"max_tokens": 120}
        )
        call = answer.choices[0].message.tool_calls[0]
        assert call.function.name == "weather" and is_weather(call.function.arguments)
        assert answer.choices[0].finish_reason == "tool_calls"


def test_chat_tools_of_a_stream(client: InferenceClient) -> None:
    given: Any = GREEDY | {"max_tokens": 120, "tools": TOOLS, "tool_choice": CHOICE}
    whole = client.chat_completion(MESSAGES, **given).choices[0].message.tool_calls[0]
    pieces = [
        call.function.arguments or ""
        for chunk in client.chat_completion(MESSAGES, stream=True, **given)
        for call in chunk.choices[0].delta.tool_calls or ()
        if getattr(call, "index", 0) == 0
    ]
    assert "".join(pieces) == whole.function.arguments
    assert isinstance(json.loads(whole.function.arguments), dict)


async def test_asyncio(later: AsyncInferenceClient, server: Server) -> None:
    text = await later.text_generation(PROMPT, adapter_id="pirate", max_new_tokens=24)
    stream = await later.text_generation(
        PROMPT, adapter_id="pirate", max_new_tokens=24, stream=True
    )
    pieces = [piece async for piece in stream]
    chat = await later.chat_completion(MESSAGES, **GREEDY)
    chunks = await later.chat_completion(MESSAGES, stream=True, **GREEDY)
    joined = "".join([one.choices[0].delta.content or "" async for one in chunks])
    assert text == "".join(pieces).removesuffix("</s>")
    assert text == server.generates("pirate")["generated_text"]
    assert chat.choices[0].message.content == joined == server.says()
