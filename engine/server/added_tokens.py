"""A tokenizer with the added tokens of an adapter. It shares its vocabulary with the base model's tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import tokenizers
from tokenizers import Tokenizer

from engine.errors import AdapterIncompatible
from engine.messages import AddedToken
from engine.names import shown


def extended(base: Tokenizer, own: Sequence[AddedToken]) -> Tokenizer:
    """`base` with the tokens in `own`, which replace those of the base with the same ids.

    Raises AdapterIncompatible if a token would get another id: added tokens are numbered in order.
    """
    made = Tokenizer(base.model)  # the same model, not a copy
    made.normalizer = base.normalizer
    made.pre_tokenizer = base.pre_tokenizer
    made.post_processor = base.post_processor
    made.decoder = base.decoder
    added = base.get_added_tokens_decoder()
    for token in own:
        added[token.id] = tokenizers.AddedToken(
            token.content,
            single_word=token.single_word,
            lstrip=token.lstrip,
            rstrip=token.rstrip,
            normalized=token.normalized,
            special=token.special,
        )
    made.add_tokens([added[id] for id in sorted(added)])
    for id, entry in added.items():
        if made.token_to_id(entry.content) != id:
            raise AdapterIncompatible(
                f"the adapter's tokens cannot be added to the base model's tokenizer: "
                f"{shown(entry.content)!r} would not have the id {id}",
                field="added_tokens",
                hint="save the adapter again with the tokenizer that it was trained with",
            )
    return made
