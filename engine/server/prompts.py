"""The tokens of a client's prompts."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from engine.server.conversation import Conversation
from engine.server.parameters import Limits, Parameters, check_prompt, invalid
from engine.server.text import Text
from engine.server.token_rules import check_ids

NORMALISED = 4  # a tokenizer normalises at most this many characters to one

Prompt = str | list[int] | Conversation  # text, tokens, or a conversation


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
    elif isinstance(prompt, Conversation):
        check_length(prompt.characters)
        tokens = await text.encode_chat(prompt, most)
    else:
        tokens = prompt
    await asyncio.sleep(0)  # other requests run between two prompts of this one
    if parameters.truncate:
        tokens = tokens[-parameters.truncate :]
    check_prompt(tokens, parameters, limits, vocab_size)
    return tokens


async def tokenized_all(
    prompts: Sequence[Prompt], parameters: Parameters, limits: Limits, text: Text, vocab_size: int
) -> list[list[int]]:
    """The tokens of every prompt; see `tokenized`."""
    return [await tokenized(one, parameters, limits, text, vocab_size) for one in prompts]
