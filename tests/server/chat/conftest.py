"""Fixtures for tools: a tokenizer with the marks of calls as special tokens, and the chat template of a family."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
import pytest
from openai import AsyncOpenAI
from transformers import AutoTokenizer

from engine.server.text import Text
from engine.server.tools.families import FAMILIES
from tests.engine_info import INFO
from tests.server.chat.test_chat_templates import TEMPLATES
from tests.server.fake import FakeBackend, Start, write_tokenizer

MARKS = sorted({mark for family in FAMILIES for mark in family.marks})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = write_tokenizer(tmp_path_factory.mktemp("tools"))
    tokenizer = AutoTokenizer.from_pretrained(made)
    tokenizer.add_special_tokens({"additional_special_tokens": [*MARKS, "[THINK]", "[/THINK]"]})
    tokenizer.save_pretrained(made)
    return made


@pytest.fixture
def family(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "hermes"))


@pytest.fixture
def text(folder: Path, family: str) -> Iterator[Text]:
    made = Text(str(folder), str(TEMPLATES / f"{family}.jinja"))
    yield made
    made.close()


@pytest.fixture
def backend(text: Text) -> FakeBackend:
    info = msgspec.structs.replace(
        INFO, max_input_length=4000, max_total_tokens=6000, vocab_size=500
    )
    return FakeBackend(text, info=info)


@pytest.fixture
async def openai(start: Start) -> AsyncIterator[AsyncOpenAI]:
    client = await start()
    made = AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key="EMPTY", max_retries=0)
    yield made
    await made.close()
