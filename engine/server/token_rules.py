"""Rules about single tokens by id: biases, tokens that end an answer, and the tokens before one may end it."""

from __future__ import annotations

import re
from collections.abc import Mapping

from engine.server.parameters import Parameters, invalid

MAX_BIASES = 1024
MOST_BIAS = 100.0
MAX_STOP_TOKENS = 128
TOKEN_ID = re.compile(r"[0-9]{1,10}")


def biases_of(given: Mapping[str, float] | None) -> dict[int, float]:
    """OpenAI's `logit_bias`, whose keys are token ids as texts. Raises InvalidRequest."""
    if not given:
        return {}
    if len(given) > MAX_BIASES:
        raise invalid(
            "logit_bias", f"has {len(given)} entries, the limit is {MAX_BIASES}", "send fewer"
        )
    found: dict[int, float] = {}
    for name, bias in given.items():
        if not TOKEN_ID.fullmatch(name):
            raise invalid(
                "logit_bias",
                f"has a key that is no token id: {name[:20]!r}",
                "POST /tokenize gives the ids of a text",
            )
        if not -MOST_BIAS <= bias <= MOST_BIAS:
            raise invalid(
                "logit_bias", f"must be between -100 and 100, not {bias}", "0 changes nothing"
            )
        found[int(name)] = bias
    return found


def check_rules(parameters: Parameters) -> None:
    """What depends neither on the adapter nor on a prompt. Raises InvalidRequest."""
    stops, least = parameters.stop_token_ids, parameters.min_new_tokens or 0
    most = parameters.max_new_tokens
    if len(stops) > MAX_STOP_TOKENS:
        raise invalid(
            parameters.name("stop_token_ids"),
            f"has {len(stops)} ids, the limit is {MAX_STOP_TOKENS}",
            "send fewer",
        )
    if most is not None and least > most:
        raise invalid(
            parameters.name("min_new_tokens"),
            f"must be at most `{parameters.name('max_new_tokens')}`, which is {most}, not {least}",
            "send a smaller value",
        )
    if parameters.grammar is None:
        return
    for name, value in (("stop_token_ids", stops), ("min_new_tokens", least)):
        if value:
            raise invalid(
                parameters.name(name),
                f"cannot be combined with `{parameters.name('grammar')}`",
                "leave one out: the grammar says where the output ends",
            )


def check_ids(parameters: Parameters, vocab_size: int) -> None:
    """Raises InvalidRequest for an id outside of the vocabulary."""
    for name, ids in (
        ("logit_bias", parameters.logit_bias),
        ("stop_token_ids", parameters.stop_token_ids),
    ):
        for id in ids:
            if not 0 <= id < vocab_size:
                raise invalid(
                    parameters.name(name),
                    f"has a token outside of 0 to {vocab_size - 1}",
                    "POST /tokenize gives the ids of a text",
                )
