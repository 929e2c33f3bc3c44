"""An answer in a format, from a model that reasons first: the format holds for what comes after the reasoning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from llguidance import LLMatcher, LLTokenizer
from tokenizers import Tokenizer

from engine.grammar import check, of_json_schema, of_lark, of_regex
from engine.server.tools.grammars import after_thoughts

MODEL = Path(__file__).resolve().parents[3] / "engine" / "demo" / "base"
TOKENIZER = LLTokenizer(Tokenizer.from_file(str(MODEL / "tokenizer.json")).to_str(), eos_token=[0])
FORMATS = [
    (of_json_schema({"type": "object", "additionalProperties": False}), "{}", "[]"),
    (of_regex(r"\d+"), "12", "x"),
    (of_lark('start: "yes" | "no"'), "yes", "maybe"),
]


def accepts(grammar: str, text: str) -> bool:
    """Whether the text is a whole answer."""
    matcher = LLMatcher(TOKENIZER, grammar, log_level=0)
    tokens = TOKENIZER.tokenize_str(text)
    return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()


@pytest.mark.parametrize(("grammar", "good", "bad"), FORMATS)
@pytest.mark.parametrize("begun", [False, True])
def test_a_format_after_thoughts(grammar: str, good: str, bad: str, begun: bool) -> None:
    wrapped = after_thoughts(grammar, ("<think>", "</think>"), begun, json.dumps)
    check(wrapped, "response_format")
    thought = "so { \n12 it is</think>"
    for answer, right in ((good, True), (bad, False), (good + bad, False)):
        assert accepts(grammar, answer) == right
        assert accepts(wrapped, thought + answer) == (right and begun)
        assert accepts(wrapped, f"<think>{thought}\n\n{answer}") == right
        assert accepts(wrapped, answer) == (right and not begun)
    assert not accepts(wrapped, "<think>so"), "it must come to an end"
