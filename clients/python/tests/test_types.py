"""Parameters: what the client refuses, and that it agrees with the server."""

from __future__ import annotations

from typing import Any

import msgspec
import pydantic
import pytest

from engine.server.merged import MergedAdapters as ServersMergedAdapters
from engine.server.native import schemas
from lorax.errors import ValidationError
from lorax.types import BatchRequest, MergedAdapters, Parameters, Request
from tests.server.fake import FakeBackend, Start

# (what to set, whether it can be served)
CASES: list[tuple[dict[str, Any], bool]] = [
    ({"best_of": 2, "do_sample": True}, True),
    ({"best_of": 2, "temperature": 0.5}, True),
    ({"best_of": 2, "top_k": 3}, True),
    ({"best_of": 2, "min_p": 0.1}, True),
    ({"best_of": 1}, True),
    ({"best_of": 2}, False),
    ({"best_of": 2, "temperature": 1.0}, False),
    ({"best_of": 2, "do_sample": True, "seed": 1}, False),
    ({"best_of": 0}, False),
    ({"repetition_penalty": 0.1}, True),
    ({"repetition_penalty": 0}, False),
    ({"frequency_penalty": -2}, True),
    ({"frequency_penalty": 2.1}, False),
    ({"presence_penalty": 2}, True),
    ({"presence_penalty": -2.1}, False),
    ({"seed": 0}, True),
    ({"seed": -1}, False),
    ({"temperature": 0}, True),
    ({"temperature": -0.1}, False),
    ({"top_k": 1}, True),
    ({"top_k": 0}, True),
    ({"top_k": -2}, False),
    ({"top_p": 1}, True),
    ({"top_p": 0}, False),
    ({"top_p": 1.1}, False),
    ({"min_p": 0}, True),
    ({"min_p": 1.1}, False),
    ({"typical_p": 0.5}, True),
    ({"typical_p": 1}, True),
    ({"typical_p": 1.1}, False),
    ({"typical_p": 0}, False),
    ({"truncate": 1}, True),
    ({"truncate": 0}, False),
    ({"max_new_tokens": 1}, True),
    ({"max_new_tokens": 0}, False),
    ({"min_new_tokens": 0}, True),
    ({"min_new_tokens": -1}, False),
    ({"return_k_alternatives": 1}, True),
    ({"return_k_alternatives": 0}, False),
    ({"stop": ["x"]}, True),
    ({"stop": ["x", ""]}, False),
    ({"merged_adapters": {"ids": ["a"], "weights": [1]}}, True),
    ({"merged_adapters": {"ids": ["a"], "weights": [1]}, "adapter_id": "b"}, False),
    ({"merged_adapters": {"ids": [], "weights": []}}, False),
    ({"merged_adapters": {"ids": ["a"], "weights": [1, 2]}}, False),
    ({"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": "svd"}}, True),
    ({"merged_adapters": {"ids": ["a"], "weights": [1], "merge_strategy": "sum"}}, False),
    ({"merged_adapters": {"ids": ["a"], "weights": [1], "density": 1}}, True),
    ({"merged_adapters": {"ids": ["a"], "weights": [1], "density": 0}}, True),
    ({"merged_adapters": {"ids": ["a"], "weights": [1], "seed": -1}}, False),
]


@pytest.mark.parametrize(("given", "served"), CASES, ids=str)
async def test_client_and_server_agree(
    start: Start, backend: FakeBackend, given: dict[str, Any], served: bool
) -> None:
    client = await start()
    response = await client.post("/generate", json={"inputs": "x", "parameters": given})
    assert response.status == (200 if served else 422)
    if served:
        assert Parameters(**given).model_dump(exclude_unset=True)
    else:
        with pytest.raises(ValidationError):
            Parameters(**given)


def test_fields_are_the_servers() -> None:
    for model, struct in (
        (Parameters, schemas.GenerateParameters),
        (MergedAdapters, ServersMergedAdapters),
        (Request, schemas.GenerateBody),
    ):
        names = {field.encode_name for field in msgspec.structs.fields(struct)}
        assert names - {"apply_chat_template", "grammar", "top_n_tokens"} == set(model.model_fields)


def test_requests() -> None:
    for empty in (lambda: Request(inputs=""), lambda: BatchRequest(inputs=[])):
        with pytest.raises(ValidationError, match="empty"):
            empty()
    several = Parameters(best_of=2, do_sample=True)
    with pytest.raises(ValidationError, match="streamed"):
        Request(inputs="x", parameters=several, stream=True)
    assert Request(inputs="x", parameters=several).parameters is several


def test_wrong_types_are_pydantics_errors() -> None:
    with pytest.raises(pydantic.ValidationError):
        Parameters(temperature="hot")
