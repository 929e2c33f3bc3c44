"""docs/api.md names everything that the routes accept, answer and refuse."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from engine.errors import ConfigError, ModelError, error_classes
from engine.metrics import Metrics
from engine.server.anthropic import schemas as anthropic
from engine.server.app import HTTP_ERRORS
from engine.server.merged import MergedAdapters
from engine.server.native import schemas as native
from engine.server.openai import schemas as openai
from engine.server.openai.responses import schemas as responses
from engine.server.routes import routes

PAGE = (Path(__file__).parents[2] / "docs" / "api.md").read_text()
UNNAMED = {"apply_chat_template", "user"}  # accepted and ignored

STRUCTS = [
    native.GenerateParameters,
    native.GenerateBody,
    native.TokenizeBody,
    native.AdapterBody,
    native.PinBody,
    native.AdapterEntry,
    native.AdapterProblem,
    MergedAdapters,
    openai.ChatBody,
    openai.CompletionBody,
    openai.LoadLoraBody,
    openai.UnloadLoraBody,
    responses.ResponsesBody,
    anthropic.MessagesBody,
    native.Details,
    native.OutputToken,
    native.StreamAnswer,
]


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_fields(struct: type[msgspec.Struct]) -> None:
    words = set(re.findall(r"\w+", PAGE))
    names = {field.encode_name for field in msgspec.structs.fields(struct)}
    assert names - UNNAMED <= words


@pytest.mark.parametrize("cls", error_classes().values(), ids=lambda cls: cls.__name__)
def test_errors(cls: type) -> None:
    if cls.error_type != "adapter" and not issubclass(cls, (ModelError, ConfigError)):
        assert re.search(rf"\| {cls.status}.* \| .*`{cls.error_type}`", PAGE)
    for status, kind in HTTP_ERRORS.items():
        assert re.search(rf"\| .*{status}.* \| .*`{kind}`", PAGE)


def test_routes() -> None:
    for route in routes():
        path = route.path.replace(":.+", "")
        assert f"`{route.method} {path}`" in PAGE


def test_metrics() -> None:
    told = set(re.findall(r"`(lorax_\w+|_\w+)", PAGE))
    for family in Metrics().registry.collect():
        suffix = "_" + "_".join(family.name.split("_")[2:])
        assert {family.name, family.name + "_total", suffix, "_success"} & told - {"_success"} or (
            family.name.endswith("_success")
        ), family.name
