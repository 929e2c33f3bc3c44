"""The names, arguments, order and defaults of lorax-client 0.7."""

from __future__ import annotations

import inspect
from typing import Any

import pytest

import lorax
from lorax import AsyncClient, Client, types

NEEDED: Any = inspect.Parameter.empty
CONNECT = {"base_url": NEEDED, "headers": None, "cookies": None, "timeout": 60}
GENERATE = {
    "prompt": NEEDED,
    "adapter_id": None,
    "adapter_source": None,
    "merged_adapters": None,
    "api_token": None,
    "do_sample": False,
    "max_new_tokens": None,
    "ignore_eos_token": False,
    "best_of": None,
    "repetition_penalty": None,
    "return_full_text": False,
    "seed": None,
    "stop_sequences": None,
    "temperature": None,
    "top_k": None,
    "top_p": None,
    "truncate": None,
    "typical_p": None,
    "watermark": False,
    "response_format": None,
    "decoder_input_details": False,
    "return_k_alternatives": None,
    "details": True,
}
NOT_STREAMED = ("best_of", "decoder_input_details", "return_k_alternatives")
STREAM = {name: value for name, value in GENERATE.items() if name not in NOT_STREAMED}

METHODS = [
    (Client, "__init__", CONNECT | {"session": None, "max_session_retries": 2}),
    (Client, "generate", GENERATE),
    (Client, "generate_stream", STREAM),
    (Client, "embed", {"inputs": NEEDED}),
    (Client, "classify", {"inputs": NEEDED}),
    (Client, "classify_batch", {"inputs": NEEDED}),
    (Client, "metrics", {"format": "prometheus"}),
    (AsyncClient, "__init__", CONNECT),
    (AsyncClient, "generate", GENERATE),
    (AsyncClient, "generate_stream", STREAM | {"return_k_alternatives": None}),
    (AsyncClient, "embed", {"inputs": NEEDED}),
    (AsyncClient, "classify", {"inputs": NEEDED}),
    (AsyncClient, "metrics", {"format": "prometheus"}),
]
TYPES = {
    "MergedAdapters": "ids weights merge_strategy density majority_sign_method",
    "ResponseFormat": "type schema_spec",
    "Parameters": "adapter_id adapter_source merged_adapters api_token do_sample max_new_tokens ignore_eos_token "
    "repetition_penalty return_full_text stop seed temperature top_k top_p truncate typical_p best_of watermark "
    "details decoder_input_details return_k_alternatives response_format",
    "Request": "inputs parameters stream",
    "BatchRequest": "inputs parameters stream",
    "InputToken": "id text logprob",
    "AlternativeToken": "id text logprob",
    "Token": "id text logprob special alternative_tokens",
    "BestOfSequence": "generated_text finish_reason generated_tokens seed prefill tokens",
    "Details": "finish_reason prompt_tokens generated_tokens seed prefill tokens best_of_sequences",
    "Response": "generated_text details",
    "StreamDetails": "finish_reason prompt_tokens generated_tokens seed",
    "StreamResponse": "token generated_text details",
    "DeployedModel": "model_id sha",
    "EmbedResponse": "embeddings",
    "ClassifyResponse": "entities",
}


@pytest.mark.parametrize(("client", "name", "expected"), METHODS)
def test_methods(client: type, name: str, expected: dict[str, Any]) -> None:
    """What lorax-client takes comes first and in its order; of the rest, nothing is required."""
    given = list(inspect.signature(getattr(client, name)).parameters.values())[1:]
    first, more = given[: len(expected)], given[len(expected) :]
    assert [(one.name, one.default) for one in first] == list(expected.items())
    assert all(one.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for one in first)
    assert all(one.default is not NEEDED for one in more)


@pytest.mark.parametrize("name", TYPES)
def test_types(name: str) -> None:
    assert set(TYPES[name].split()) <= set(getattr(types, name).model_fields)


def test_values() -> None:
    reasons = {
        "Length": "length",
        "EndOfSequenceToken": "eos_token",
        "StopSequence": "stop_sequence",
    }
    assert {one.name: one.value for one in types.FinishReason} == reasons
    assert types.ResponseFormatType.json_object == "json_object"


def test_the_package_is_complete() -> None:
    assert set(lorax.__all__) == {"AsyncClient", "Client", "MergedAdapters", "__version__"}
    assert all(hasattr(lorax, name) for name in lorax.__all__)


@pytest.mark.parametrize(
    "part", [(Client, AsyncClient), (lorax.client.Adapters, lorax.client.AsyncAdapters)]
)
def test_both_clients_have_the_same_methods(part: tuple[type, type]) -> None:
    one, other = part
    names = {name for name in vars(one) if not name.startswith("_")}
    assert names == {name for name in vars(other) if not name.startswith("_")}
    for name in names:
        assert (
            inspect.signature(getattr(one, name)).parameters
            == inspect.signature(getattr(other, name)).parameters
        )


def test_methods_of_the_async_client_are_coroutines() -> None:
    assert inspect.iscoroutinefunction(AsyncClient.generate)
    assert AsyncClient.generate.__doc__ == Client.generate.__doc__ != ""
