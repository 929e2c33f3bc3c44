"""Tokens that end a request, and the minimum before them."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest

from engine.messages import Request
from tests.engine.harness import Harness, config_of, request
from tests.tiny import make_model

PROMPT = [3, 99, 41, 41, 7, 150, 2, 88]


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    folder = tmp_path_factory.mktemp("model")
    make_model("llama", folder)
    made = Harness(config_of(folder, device="cpu"))
    yield made
    made.close()


def test_an_end_counts_after_the_minimum(harness: Harness) -> None:
    free = request("free", PROMPT)
    tokens = harness.run([free])["free"].tokens

    def ending(least: int, *ends: int) -> Request:
        made = request(str(least), PROMPT, min_tokens=least, delayed=ends if least else ())
        return msgspec.structs.replace(made, eos_token_ids=list(ends))

    stop = tokens[2]
    outcomes = harness.run([free, ending(0, stop), ending(5, stop)])
    first = tokens.index(stop)
    assert outcomes["free"].tokens == tokens
    assert outcomes["0"].tokens == tokens[: first + 1] and outcomes["0"].finish == "eos"
    later = outcomes["5"].tokens
    assert later[:first] == tokens[:first]
    assert len(later) > 5 and stop not in later[:5]
