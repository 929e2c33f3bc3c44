"""A tokenizer.json of a stranger, read as JSON: its added tokens, and digests of its other parts.

The parts are compared with the base model's by what they do, not byte by byte: versions of `tokenizers` write merges in
two ways and leave out fields that change nothing. Memory stays in proportion to the base model's file.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from engine.errors import AdapterIncompatible
from engine.messages import AddedToken
from engine.names import shown

MAX_ADDED = 1 << 14  # added tokens of a file; Gemma has 6,400
MAX_CONTENT = 256  # characters of an added token
MAX_PART_BYTES = 4 << 20  # of a part other than the model
MAX_ID = (1 << 31) - 1
PARTS = ("model", "normalizer", "pre_tokenizer", "decoder")
POST_PROCESSOR = "post_processor"
RESAVE_TOKENIZER = (
    "load the base model's tokenizer, add the tokens, and save it with save_pretrained; or remove tokenizer.json to "
    "use the base model's"
)

_NULL = msgspec.Raw(b"null")
_COMMAS = 1 << 16  # of a part other than the model, and more than the base's model has
_OFFSETS_ONLY = ("trim_offsets", "str_rep")  # they change no token
_TRUE = ("use_regex", "split")  # true where an old version lacks them


class _File(msgspec.Struct):
    model: msgspec.Raw = _NULL
    normalizer: msgspec.Raw = _NULL
    pre_tokenizer: msgspec.Raw = _NULL
    decoder: msgspec.Raw = _NULL
    post_processor: msgspec.Raw = _NULL
    added_tokens: msgspec.Raw = _NULL


@dataclass(frozen=True, slots=True)
class TokenizerFile:
    """What a tokenizer.json says."""

    digest: bytes  # of the file
    added: Mapping[int, AddedToken]
    effects: Mapping[str, bytes]  # part -> digest of what it does
    vocabulary: Mapping[str, int]  # without the added tokens; empty if it was not read
    size: int  # the highest id, plus one
    commas: int  # of the model


def read_tokenizer(data: bytes, base: TokenizerFile | None) -> TokenizerFile:
    """`base`: that of the base model, which bounds the size; None: this is the base model's.

    A model that is larger than the base's is not read: it has a digest of its own. Raises AdapterIncompatible.
    """
    try:
        file = msgspec.json.decode(data, type=_File)
        added = _added(file.added_tokens)
        effects = {
            part: _effect(_decoded(getattr(file, part))) for part in (*PARTS[1:], POST_PROCESSOR)
        }
        commas = bytes(file.model).count(b",")
        vocabulary: Mapping[str, int] = {}
        if base is None or commas <= 2 * base.commas + _COMMAS:
            model = msgspec.json.decode(file.model)
            vocabulary = _vocabulary(model)
            effects["model"] = _effect(_plain_model(model))
        else:
            effects["model"] = hashlib.sha256(file.model).digest()
    except (ValueError, RecursionError, TypeError, AttributeError, LookupError) as error:
        raise AdapterIncompatible(
            f"tokenizer.json cannot be read ({shown(str(error))})",
            field="tokenizer.json",
            hint=RESAVE_TOKENIZER,
        ) from None
    size = 1 + max((*vocabulary.values(), *added), default=-1)
    return TokenizerFile(hashlib.sha256(data).digest(), added, effects, vocabulary, size, commas)


def check_ids(
    added: Mapping[int, AddedToken],
    own: Sequence[AddedToken],
    size: int,
    vocabulary: Mapping[str, int],
) -> None:
    """Raises AdapterIncompatible for an own token whose id is not the one that `tokenizers` gives it.

    A token in the vocabulary keeps its id; the others get the next free one, in order. `added`: all added tokens.
    `size`: of the vocabulary.
    """
    ids = {token.id for token in own}
    highest, seen = -1, dict[str, int]()
    for id in sorted(added):
        content = added[id].content
        given = seen.get(content, vocabulary.get(content, max(highest + 1, size)))
        if given != id and id in ids:
            raise AdapterIncompatible(
                f"tokenizer.json: the added token {shown(content)!r} has the id {id}; loaded, it would have {given}",
                field="added_tokens",
                hint=RESAVE_TOKENIZER,
            )
        highest, seen[content] = max(highest, given), given


def _added(raw: msgspec.Raw) -> dict[int, AddedToken]:
    """The added tokens by id. Raises ValueError."""
    if bytes(raw).count(b"{") > MAX_ADDED:
        raise ValueError(f"more than {MAX_ADDED} added tokens")
    tokens = msgspec.json.decode(raw, type=list[AddedToken] | None) or []
    found = {token.id: token for token in tokens}
    if len(found) < len(tokens):
        raise ValueError("two added tokens have the same id")
    if len({token.content for token in tokens}) < len(tokens):
        raise ValueError("two added tokens have the same content")
    for token in tokens:
        if not 0 <= token.id <= MAX_ID:
            raise ValueError(f"an added token has the id {token.id}")
        if not token.content or len(token.content) > MAX_CONTENT:
            raise ValueError(
                f"added token {token.id} has {len(token.content)} characters; the limit is {MAX_CONTENT}"
            )
    return found


def _decoded(raw: msgspec.Raw) -> Any:
    """A part other than the model. Raises ValueError."""
    data = bytes(raw)
    if len(data) > MAX_PART_BYTES or data.count(b",") > _COMMAS:
        raise ValueError(f"a part has {len(data)} bytes")
    return _plain(msgspec.json.decode(data))


def _vocabulary(model: Any) -> dict[str, int]:
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: pieces with scores
        return {piece: id for id, (piece, _) in enumerate(vocabulary)}
    if not all(isinstance(id, int) for id in vocabulary.values()):
        raise ValueError("an id in the vocabulary is not a number")
    return dict(vocabulary)


def _plain_model(model: dict[str, Any]) -> dict[str, Any]:
    """A model with merges as texts, without fields that change nothing."""
    rest = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
    merges = [
        one if isinstance(one, str) else f"{one[0]} {one[1]}" for one in model.get("merges") or ()
    ]
    return {"rest": _plain(rest), "vocab": model.get("vocab"), "merges": merges}


def _plain(value: Any) -> Any:
    """A part without fields that change nothing."""
    if isinstance(value, list):
        return [_plain(one) for one in value]
    if not isinstance(value, dict):
        return value
    metaspace = value.get("type") == "Metaspace" and "prepend_scheme" in value
    return {
        name: _plain(one)
        for name, one in value.items()
        if not (
            one is None
            or one is False
            or one in ("", [], {})
            or name in _OFFSETS_ONLY
            or (name in _TRUE and one is True)
            or (name == "add_prefix_space" and metaspace)
        )
    }


def _effect(value: Any) -> bytes:
    return hashlib.sha256(msgspec.json.encode(value, order="deterministic")).digest()
