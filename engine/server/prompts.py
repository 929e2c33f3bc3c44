"""The tokens of a client's prompts."""

from __future__ import annotations

import asyncio
from typing import Any, cast

from engine.server.parameters import Limits, Parameters, check_prompt, invalid
from engine.server.text import Text, characters
from engine.server.token_rules import check_ids

NORMALISED = 4  # a tokenizer normalises at most this many characters to one

Prompt = str | list[int] | list[dict[str, Any]]  # text, tokens, or a conversation


async def tokenized(
    prompt: Prompt, parameters: Parameters, limits: Limits, text: Text, vocab_size: int
) -> list[int]:
    """The tokens of one prompt; raises InvalidRequest if they do not fit. `vocab_size` 0: the base model's."""
    check_ids(parameters, vocab_size or limits.vocab_size)
    most = limits.max_input_length * NORMALISED * text.longest_token

    def check_length(characters: int) -> None:
        """Before tokenizing, which would take long for a text that is certainly too long."""
        if characters > most:
            raise invalid(
                parameters.name("inputs"),
                f"has {characters} characters, the limit is {limits.max_input_length} tokens",
                "shorten it",
            )

    if isinstance(prompt, str):
        if parameters.truncate:  # a token at this cut is cut off again below
            prompt = prompt[-most:]
        check_length(len(prompt))
        tokens = await text.encode(prompt, special=parameters.special)
    elif prompt and isinstance(prompt[0], dict):
        check_length(characters(prompt))
        tokens = await text.encode_chat(prompt, most)
    else:
        tokens = cast(list[int], prompt)
    await asyncio.sleep(0)  # other requests run between two prompts of this one
    if parameters.truncate:
        tokens = tokens[-parameters.truncate :]
    check_prompt(tokens, parameters, limits, vocab_size)
    return tokens
