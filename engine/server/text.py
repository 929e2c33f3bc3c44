"""Text to tokens and back: the tokenizer, the chat template, and detokenizing token by token.

The only module that imports transformers, which finds and converts the tokenizer and renders chat templates. Encoding
and decoding call the Rust tokenizer directly. The text of an answer never contains special tokens.
"""

from __future__ import annotations

import asyncio
import copy
import json
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from msgspec import Struct
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from engine.errors import InvalidRequest, ModelError
from engine.messages import AdapterText
from engine.server.added_tokens import extended
from engine.server.chat_template import DEFAULT, ChatTemplate, read_chat_template
from engine.server.conversation import Conversation
from engine.server.templates import Templates

LONG_TEXT = 4096  # longer texts are encoded in a thread: this many characters take about 1 ms
NUM_THREADS = 2
NUM_CONTEXT = 6  # last tokens of the prompt, which decide whether the answer begins with a space
MAX_PENDING = 8  # tokens without a whole character; after more, the bytes are treated as invalid
MAX_STRADDLING = 64  # tokens after which a split character is given up, too
REPLACEMENT = "\ufffd"
MAX_RENDERED = 1 << 20  # characters that an adapter's chat template may make

T = TypeVar("T")


class Span(Struct, frozen=True):
    """A token and its characters `start` to `stop` (exclusive) of the text; none for added tokens."""

    id: int
    text: str
    start: int
    stop: int


def _byte_alphabet() -> dict[str, int]:
    """The characters that stand for bytes in byte-level BPE (Radford et al. 2019, GPT-2)."""
    shown = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in shown]
    alphabet = {chr(byte): byte for byte in shown}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(hidden)}


_BYTES = _byte_alphabet()


class TextStream:
    """The text of tokens as they arrive. All pieces and `flush()` joined are the text; no piece splits a character.

    `DecodeStream` waits until bytes make whole characters. Models also produce invalid UTF-8, for which it would wait
    for ever or raise; here it becomes replacement characters.
    """

    __slots__ = ("_pending", "_skip", "_stream", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, context: Sequence[int] = (), *, skip_special: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._stream = self._begin(list(context))
        self._pending: list[int] = []

    def _begin(self, context: list[int]) -> DecodeStream:
        return DecodeStream(context or None, self._skip)

    def push(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        self._pending.append(token)
        try:
            piece = self._stream.step(self._tokenizer, token)
        except Exception:  # tokenizers raises no narrower class when the text proves invalid
            return self._restart(len(self._pending), [token])
        if piece is not None:
            self._pending.clear()
            return str(piece)
        if len(self._pending) > MAX_PENDING:
            return self._settle()
        return ""

    def flush(self) -> str:
        """The rest, at the end. An incomplete character becomes a replacement character."""
        text = self._decode(self._pending)
        self._pending.clear()
        return text

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=self._skip) if tokens else ""

    def _settle(self) -> str:
        """The text of pending tokens that later tokens cannot change: all but a few, split between characters."""
        whole = self._decode(self._pending)
        for keep in range(4, MAX_PENDING):
            head, tail = self._pending[:-keep], self._pending[-keep:]
            if self._decode(head) + self._decode(tail) == whole:
                return self._restart(len(head), [])
        if len(self._pending) > MAX_STRADDLING:
            return self._restart(len(self._pending), [])
        return ""

    def _restart(self, num_out: int, context: list[int]) -> str:
        """The text of the first `num_out` pending tokens; the others go to a new stream."""
        text = self._decode(self._pending[:num_out])
        rest = self._pending[num_out:]
        self._stream = self._begin(context)
        self._pending = []
        return text + "".join([self.push(token) for token in rest])


class Text:
    """One tokenizer with its chat template.

    `source` is a folder or a hub id. `chat_template` is a tokenizer_config.json or a Jinja file whose template replaces
    the model's. Raises ModelError or ConfigError.
    """

    def __init__(
        self,
        source: str,
        chat_template: str | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        cache: str | None = None,
    ) -> None:
        from transformers import AutoTokenizer

        where: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache}
        try:
            loaded: Any = AutoTokenizer.from_pretrained(source, **where)
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelError(f"cannot load the tokenizer of {source}: {error}") from None
        if not getattr(loaded, "is_fast", False):
            raise ModelError(
                f"the tokenizer of {source} has no fast version",
                hint="convert it to a fast tokenizer and save it as tokenizer.json",
            )
        self._loaded = loaded
        self._tokenizer: Tokenizer = loaded.backend_tokenizer
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        if chat_template:
            loaded.chat_template = read_chat_template(Path(chat_template))
        # Characters of the longest token in the vocabulary, as the tokenizer writes it.
        self.longest_token = max(map(len, self._tokenizer.get_vocab(with_added_tokens=True)))
        added = self._tokenizer.get_added_tokens_decoder()
        self.special_ids = frozenset(id for id, entry in added.items() if entry.special)
        self.eos_token_ids = self._find_eos(source, where)
        self.chat = ChatTemplate(loaded.chat_template, loaded.special_tokens_map)
        self._token_texts: dict[int, str] = {}
        self._pool = ThreadPoolExecutor(NUM_THREADS, thread_name_prefix="text")

    def adapted(self, own: AdapterText, templates: Templates) -> Text:
        """This text with an adapter's tokens and chat template, which `templates` renders.

        The vocabulary is shared, so a copy is small. Raises AdapterIncompatible.
        """
        made = copy.copy(self)
        if own.tokens:
            made._tokenizer = extended(self._tokenizer, own.tokens)
            made._token_texts = {}
            made.longest_token = max(
                self.longest_token, *(len(token.content) for token in own.tokens)
            )
            added = made._tokenizer.get_added_tokens_decoder()
            made.special_ids = frozenset(id for id, entry in added.items() if entry.special)
        specials = self._loaded.special_tokens_map if own.specials is None else own.specials
        eos = made._tokenizer.token_to_id(specials.get("eos_token", ""))
        if eos is not None:
            made.eos_token_ids = sorted({*self.eos_token_ids, eos})
        if own.template is not None:
            named = {**own.named_templates, DEFAULT: own.template}
            made.chat = ChatTemplate(named, specials, templates.render)
        else:
            made.chat = self.chat.with_specials(own.specials or {})
        return made

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    # -- to tokens

    async def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of `text`, with the special tokens that the tokenizer adds (BOS) if `special`."""
        if len(text) < LONG_TEXT:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        return await self.in_thread(lambda: self._encode_batch(text, special))

    def _encode_batch(self, text: str, special: bool) -> list[int]:
        # encode_batch releases the GIL, encode does not: measured 50 ms against 2 s
        (found,) = self._tokenizer.encode_batch([text], add_special_tokens=special)
        return list(found.ids)

    async def encode_chat(
        self, conversation: Conversation, max_characters: int = MAX_RENDERED
    ) -> list[int]:
        """The tokens of a conversation; raises InvalidRequest if the chat template refuses it.

        `max_characters`: of what an adapter's template may make of it.
        """
        if self.chat.is_own:
            prompt = await self.chat.render_own(conversation, max_characters)
        elif conversation.size < LONG_TEXT:
            prompt = self.chat.render(conversation)
        else:
            prompt = await self.in_thread(lambda: self.chat.render(conversation))
        if not prompt:
            raise InvalidRequest(
                "the chat template makes an empty prompt of these messages",
                field="messages",
                hint="add a message with the role user",
            )
        return await self.encode(prompt, special=False)

    async def tokenize(self, text: str, *, special: bool = True) -> list[Span]:
        """Every token with its range of characters in `text`."""

        def spans() -> list[Span]:
            (found,) = self._tokenizer.encode_batch([text], add_special_tokens=special)
            entries = zip(found.ids, found.tokens, found.offsets, strict=True)
            return [
                Span(id, text[start:stop] if stop > start else token, start, stop)
                for id, token, (start, stop) in entries
            ]

        return spans() if len(text) < LONG_TEXT else await self.in_thread(spans)

    async def in_thread(self, work: Callable[[], T]) -> T:
        """The result of work that takes long, in one of the threads for texts."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, work)

    # -- to text

    def stream(self, prompt: Sequence[int] = (), *, skip_special: bool = True) -> TextStream:
        """A stream of the text that follows `prompt`."""
        return TextStream(self._tokenizer, self._context(prompt), skip_special=skip_special)

    def special_tokens(self, names: Iterable[str]) -> dict[str, int]:
        """Name -> id of those of `names` that are special tokens."""
        found = ((name, self._tokenizer.token_to_id(name)) for name in names)
        return {name: id for name, id in found if id is not None and id in self.special_ids}

    def written(self, tokens: Sequence[int]) -> str:
        """The text of tokens, with special tokens."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False))

    def decode(self, tokens: Iterable[int], prompt: Sequence[int] = ()) -> str:
        """The text of `tokens` where they follow `prompt`, without special tokens."""
        context = self._context(prompt)
        before = self._tokenizer.decode(context, skip_special_tokens=True) if context else ""
        whole = str(self._tokenizer.decode([*context, *tokens], skip_special_tokens=True))
        return whole[len(before) :]

    def _context(self, prompt: Sequence[int]) -> list[int]:
        context = list(prompt[-NUM_CONTEXT:])
        if context and self._tokenizer.decode(context, skip_special_tokens=True).endswith(
            REPLACEMENT
        ):
            return []  # the prompt ends inside a character
        return context

    def token_text(self, token: int) -> str:
        """The text of one token; of a special token, its name. Parts of characters become replacement characters."""
        text = self._token_texts.get(token)
        if text is None:
            # Some decoders drop the space of a first word, so the token is decoded as the second of two.
            text = str(self._tokenizer.decode([token, token], skip_special_tokens=False))
            alone = str(self._tokenizer.decode([token], skip_special_tokens=False))
            text = text[len(alone) :] if text.startswith(alone) else alone
            self._token_texts[token] = text
        return text

    def token_bytes(self, token: int) -> bytes:
        """The bytes of one token, even if they are only a part of a character."""
        text = self.token_text(token)
        if REPLACEMENT not in text:
            return text.encode()
        piece = self._tokenizer.id_to_token(token) or ""
        if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece):
            return bytes([int(match[1], 16)])
        if all(char in _BYTES for char in piece):
            return bytes(_BYTES[char] for char in piece)
        return text.encode()

    # -- facts from the model's files

    @property
    def vocab_size(self) -> int:
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    @property
    def first_token(self) -> int:
        """A token that any prompt may begin with."""
        bos = self._loaded.bos_token_id
        return int(bos) if bos is not None else (self.eos_token_ids or [0])[0]

    @property
    def has_chat_template(self) -> bool:
        return bool(self.chat)

    def _find_eos(self, source: str, where: dict[str, Any]) -> list[int]:
        """Every token that ends a sequence: those of the generation config, else of the config, and the tokenizer's."""
        from transformers.utils import cached_file

        def ids_in(name: str) -> list[int]:
            path = cached_file(
                source,
                name,
                **where,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
                _raise_exceptions_for_gated_repo=False,
            )
            try:
                found = json.loads(Path(path).read_text()).get("eos_token_id") if path else None
            except (OSError, ValueError) as error:
                raise ModelError(f"cannot read {name} of {source}: {error}") from None
            return [found] if isinstance(found, int) else list(found or [])

        ids = ids_in("generation_config.json") or ids_in("config.json")
        own = self._loaded.eos_token_id
        return sorted({*ids, *([own] if own is not None else [])})
