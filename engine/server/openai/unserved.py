"""Fields of other servers that change an answer and that this server does not serve: refused by name."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from engine.server.parameters import invalid

# Field -> what to do instead.
REMEDIES = {
    "schema": "send `response_format` with `json_schema`",
    "json_schema": "send `response_format` with `json_schema`",
    "grammar": "send `structured_outputs` with `grammar`",
    "prompt_logprobs": "send `echo` and `logprobs` to /v1/completions",
    "skip_special_tokens": "leave it out: special tokens are never part of a text",
    "use_beam_search": "leave it out",
    "bad_words": "send `logit_bias` with -100",
    "allowed_token_ids": "send `structured_outputs` or `logit_bias`",
    "modalities": "leave it out: this server answers with text",
    "audio": "leave it out: this server answers with text",
}

# Values that change nothing, where they are not those of all fields.
OFF: dict[str, tuple[Any, ...]] = {
    "prompt_logprobs": (),
    "skip_special_tokens": (True,),
    "modalities": (["text"], []),
}


class Unserved(Struct, frozen=True, kw_only=True):
    """The fields of `REMEDIES`. Their types are free, because no value but that for "off" is accepted."""

    schema: Any = None
    json_schema: Any = None
    grammar: Any = None
    prompt_logprobs: Any = None
    skip_special_tokens: Any = None
    use_beam_search: Any = None
    bad_words: Any = None
    allowed_token_ids: Any = None
    modalities: Any = None
    audio: Any = None


def refuse_unserved(body: Unserved) -> None:
    """Raises InvalidRequest for the first field with a value that would change the answer."""
    for name, remedy in REMEDIES.items():
        value = getattr(body, name)
        if value is not None and value not in OFF.get(name, (False, "", [], {})):
            raise invalid(name, "is not supported by this server", remedy)
