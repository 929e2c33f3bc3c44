"""Structured output: grammars that are checked in the front, compiled beside the steps, and matched token by token.

A grammar is a text of llguidance (https://github.com/guidance-ai/llguidance): JSON that names schemas and Lark
grammars, or Lark. A *matcher* is the state of one sequence. It is compiled once for each grammar, in a thread, and
copied for each sequence. Before a token is sampled, the matcher says which tokens may come next: one bit for each token
of the vocabulary. It is fed the tokens that the scheduler has committed, so a step that is undone needs nothing.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from engine.errors import GenerationError, InvalidRequest

if TYPE_CHECKING:
    from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer

MAX_BYTES = 1 << 18  # of a grammar
MAX_KEPT = 256  # compiled grammars
MAX_TOKENIZERS = 4  # with different tokens that end an output
COMPILE_THREADS = 2
NICENESS = 9  # of these threads: steps come first
# llguidance descends into a grammar by recursion, and a thread whose stack is too small ends the process. A grammar of
# MAX_BYTES needs up to 256 MiB. Memory is taken only as far as a grammar needs it.
STACK_BYTES = 1 << 29
# Of a matcher; beyond them it fails, and only its request with it.
MAX_GRAMMAR_SYMBOLS = 200_000
MAX_LEXER_STATES = 100_000  # about 2 KB each
STEP_LEXER_FUEL = 200_000  # of one mask, about 15 ms
STEP_ITEMS = 50_000  # of one mask, about 3 ms
INITIAL_FUEL = 1_000_000  # of the start, about 20 ms

WHITE_SPACE = r"(\n {0,32}| )?"
SIMPLER = "make the grammar simpler"

Eos = tuple[int, ...]  # the tokens that end an output
K = TypeVar("K")
V = TypeVar("V")
T = TypeVar("T")
_starting = threading.Lock()  # Python has one stack size for all threads to come


def _limits() -> LLParserLimits:
    from llguidance import LLParserLimits

    return LLParserLimits(
        initial_lexer_fuel=INITIAL_FUEL,
        step_lexer_fuel=STEP_LEXER_FUEL,
        step_max_items=STEP_ITEMS,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=MAX_GRAMMAR_SYMBOLS,
    )


def of_json_schema(schema: dict[str, Any]) -> str:
    """The grammar of the instances of a schema.

    Between two parts there is at most a line break with its indentation, or one space: a model could otherwise write
    white space for ever. Keywords that are not supported are errors, whatever the schema says about itself.
    Raises ValueError for an integer of more than 64 bits.
    """
    from llguidance import LLMatcher

    fixed = {"whitespace_pattern": WHITE_SPACE, "lenient": False, "coerce_one_of": False}
    return LLMatcher.grammar_from_json_schema(schema, overrides=fixed)  # type: ignore[arg-type]


def of_regex(regex: str) -> str:
    """The grammar of the texts that match a whole expression (the crate regex, without look-around)."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_regex(regex)


def of_lark(grammar: str) -> str:
    """The grammar of a text in llguidance's form of Lark."""
    from llguidance import LLMatcher

    return LLMatcher.grammar_from_lark(grammar)


def digest_of(grammar: str) -> bytes:
    """Its identity in caches."""
    return hashlib.blake2b(grammar.encode("utf-8", "surrogatepass")).digest()


def check(grammar: str, field: str) -> None:
    """Raises InvalidRequest for a grammar that is too large, wrong, or not supported. Takes a while."""
    from llguidance import LLMatcher

    if len(grammar) > MAX_BYTES:
        raise InvalidRequest(
            f"`{field}` has {len(grammar)} characters as a grammar, the limit is {MAX_BYTES}",
            field=field,
            hint="make it smaller",
        )
    is_error, reasons = _with_stack(
        lambda: LLMatcher.validate_grammar_with_warnings(grammar, limits=_limits())
    )
    if is_error:
        reason = " ".join(" ".join(reasons).split())[:300]
        raise InvalidRequest(
            f"`{field}` cannot be served: {reason}",
            field=field,
            hint="correct it, or leave out what is not supported",
        )


class Constrained(NamedTuple):
    """A row whose next token is constrained."""

    at: int  # its place among the rows that are sampled
    id: str  # of the request
    tokens: Sequence[int]  # prompt, and output so far
    prompt_length: int


class _State:
    """The matcher of one open request."""

    def __init__(self, compiled: Future[LLMatcher]) -> None:
        self.compiled = compiled
        self.consumed = 0  # tokens of the output
        self._matcher: LLMatcher | None = None

    def follow(self, row: Constrained) -> LLMatcher:
        """The matcher after the row's output. Raises GenerationError if it has failed."""
        if self._matcher is None:
            self._matcher = self.compiled.result().deep_copy()
        new = list(row.tokens[row.prompt_length + self.consumed :])
        self.consumed += len(new)
        if new and not self._matcher.is_stopped():
            self._matcher.consume_tokens(new)
        self.raise_if_failed()
        return self._matcher

    def raise_if_failed(self) -> None:
        """Raises GenerationError."""
        if self._matcher is not None and self._matcher.is_error():
            reason = " ".join(self._matcher.get_error().split())[:200]
            raise GenerationError(
                f"the grammar cannot be followed any further: {reason}", hint=SIMPLER
            )


class Grammars:
    """Matchers of one vocabulary, for the open requests that have a grammar. Belongs to the engine's thread."""

    def __init__(self, tokenizer: Callable[[], str], vocab: int) -> None:
        """`tokenizer` gives the text of tokenizer.json; it is called in a thread, for the first grammar."""
        self._json, self._vocab = tokenizer, vocab
        self._threads: ThreadPoolExecutor | None = None
        self._tokenizers: OrderedDict[Eos, Future[LLTokenizer]] = OrderedDict()
        self._compiled: OrderedDict[tuple[Eos, bytes], Future[LLMatcher]] = OrderedDict()
        self._states: dict[str, _State] = {}
        self._executor: LLExecutor | None = None

    @property
    def any(self) -> bool:
        """Whether an open request has a grammar."""
        return bool(self._states)

    def open(self, id: str, grammar: str, eos: Iterable[int]) -> None:
        """Starts to compile the grammar of a request, unless it is compiled. `eos`: the tokens that end its output."""
        ends = tuple(sorted(token for token in eos if token < self._vocab))
        digest = digest_of(grammar)
        compiled = self._compiled.get((ends, digest))
        if compiled is None:
            if self._threads is None:
                self._threads = ThreadPoolExecutor(COMPILE_THREADS, "grammar", _be_nice)
            tokenizer = self._tokenizers.get(ends)
            if tokenizer is None:
                tokenizer = self._threads.submit(self._load, ends)
                _keep(self._tokenizers, ends, tokenizer, MAX_TOKENIZERS)
            compiled = self._threads.submit(_compile, tokenizer, grammar)
            _keep(self._compiled, (ends, digest), compiled, MAX_KEPT)
        else:
            self._compiled.move_to_end((ends, digest))
        self._states[id] = _State(compiled)

    def is_ready(self, id: str) -> bool:
        """Whether the grammar of the request is compiled. Raises GenerationError if that failed."""
        compiled = self._states[id].compiled
        if not compiled.done():
            return False
        compiled.result()
        return True

    def close(self, id: str) -> None:
        """The request has ended. It may have no grammar."""
        self._states.pop(id, None)

    def fill(
        self, rows: Sequence[Constrained], masks: np.ndarray
    ) -> list[tuple[str, GenerationError]]:
        """Writes the allowed tokens of each row into masks[row] [words] int32. Returns the requests that failed.

        `masks` [rows or more, words] is contiguous, with a bit for every token of the vocabulary.
        """
        failed: dict[str, GenerationError] = {}
        matchers: list[tuple[LLMatcher, int]] = []
        for index, row in enumerate(rows):
            try:
                matchers.append((self._states[row.id].follow(row), index))
            except GenerationError as error:
                failed[row.id] = error
        if matchers:
            self._compute(matchers, masks)
        for index, row in enumerate(rows):
            try:
                self._states[row.id].raise_if_failed()
            except GenerationError as error:
                failed[row.id] = error
            if row.id in failed:
                masks[index] = -1  # its token is dropped
        return list(failed.items())

    def _compute(self, matchers: list[tuple[LLMatcher, int]], masks: np.ndarray) -> None:
        assert masks.flags.c_contiguous and masks.shape[1] == -(-self._vocab // 32)
        size = masks.strides[0]
        if len(matchers) == 1:
            ((matcher, index),) = matchers
            matcher.unsafe_compute_mask_ptr(masks[index].ctypes.data, size)
            return
        if self._executor is None:
            from llguidance import LLExecutor

            self._executor = LLExecutor(max(1, len(os.sched_getaffinity(0)) // 2))
        self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, size, len(masks))

    def _load(self, ends: Eos) -> LLTokenizer:
        from llguidance import LLTokenizer

        return LLTokenizer(self._json(), n_vocab=self._vocab, eos_token=list(ends))

    def shut_down(self) -> None:
        """Ends the threads."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


def _compile(tokenizer: Future[LLTokenizer], grammar: str) -> LLMatcher:
    from llguidance import LLMatcher

    tokens = tokenizer.result()
    try:
        matcher = _with_stack(lambda: LLMatcher(tokens, grammar, log_level=0, limits=_limits()))
    except Exception as error:  # a thread boundary
        raise GenerationError(f"the grammar cannot be compiled: {error}", hint=SIMPLER) from None
    matcher.compute_bitmask()  # the first mask takes milliseconds; copies of the matcher know it
    if matcher.is_error():
        reason = " ".join(matcher.get_error().split())[:200]
        raise GenerationError(f"the grammar cannot be compiled: {reason}", hint=SIMPLER)
    return matcher


def _with_stack(call: Callable[[], T]) -> T:
    """The result of `call` in a thread with STACK_BYTES, which ends with it."""
    done: Future[T] = Future()

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:  # a thread boundary
            done.set_exception(error)

    with _starting:
        before = threading.stack_size(STACK_BYTES)
        try:
            threading.Thread(target=run, name="grammar", daemon=True).start()
        finally:
            threading.stack_size(before)
    return done.result()


def _keep(cache: OrderedDict[K, V], key: K, value: V, most: int) -> None:
    cache[key] = value
    if len(cache) > most:
        cache.popitem(last=False)


def _be_nice() -> None:
    with suppress(OSError):
        os.nice(NICENESS)  # of this thread, on Linux
