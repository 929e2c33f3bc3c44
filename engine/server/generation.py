"""From checked parameters to a stream of events: the one pipeline behind every route, and the command line in-process.

    async with generator.open([prompt], parameters) as generation:
        while (events := await generation.next()) is not None:
            ...

A generation is one request of a client: its prompts, each continued `best_of` times, all with one adapter. The engine's
updates become events when they arrive; whoever reads gets all that have arrived at once. Leaving the block cancels what
still runs. The adapter's lease ends with the last sequence, whatever becomes of the reader; a sequence that ends at a
stop sequence is answered while the engine still lets go of it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, cast

from engine.config import EngineConfig
from engine.errors import LoraxError
from engine.messages import Request, Update
from engine.metrics import Metrics
from engine.server.backend import Backend, Lease, Reader
from engine.server.parameters import Limits, Parameters, check, check_prompt, invalid
from engine.server.sequence import Event, Finish, Sequence
from engine.server.stops import StopMatcher
from engine.server.text import Text, characters
from engine.server.waiting import Waiter

log = logging.getLogger(__name__)

NORMALISED = 4  # characters of a text that a tokenizer may make one of, at most

Prompt = str | list[int] | list[dict[str, Any]]  # text, tokens, or a conversation


@dataclass(slots=True)
class Timings:
    """When things happened, by time.monotonic()."""

    received: float
    validated: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    finished: float = 0.0


@dataclass(slots=True, eq=False)
class _Running:
    """A sequence that the engine works on, and the reader of its updates."""

    generation: Generation
    sequence: Sequence
    last: float = 0.0  # when the newest token came
    over: bool = False  # finished, failed or cancelled: what still comes of it is nobody's
    cancelled: bool = False  # the engine was told

    def take(self, update: Update) -> None:
        """See `Reader`."""
        self.generation.take(self, update)

    def on_engine_lost(self, error: LoraxError) -> None:
        """See `Reader`."""
        self.generation.lose(self, error)


class Generation:
    """An open request. Made by `Generator.open`."""

    def __init__(
        self,
        id: str,
        parameters: Parameters,
        prompts: list[list[int]],
        lease: Lease | None,
        timings: Timings,
        owner: Generator,
    ) -> None:
        self.id = id
        self.parameters = parameters
        self.prompts = prompts  # the tokens that go in, of every prompt
        self.timings = timings
        self.adapter_source = lease.image.source if lease is not None else ""
        self.finished: dict[int, Finish] = {}
        self._owner = owner
        self._lease = lease
        self._events: list[Event] = []
        self._error: LoraxError | None = None
        self._waiter = Waiter()
        self._open: set[_Running] = set()  # that the engine has not let go of

    @property
    def num_choices(self) -> int:
        return len(self.prompts) * self.parameters.best_of

    @property
    def _complete(self) -> bool:
        return len(self.finished) == self.num_choices

    def prompt_of(self, choice: int) -> list[int]:
        return self.prompts[choice // self.parameters.best_of]

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.prompts))

    @property
    def cached_tokens(self) -> int:
        firsts = range(0, self.num_choices, self.parameters.best_of)
        return sum(self.finished[at].usage.cached_tokens for at in firsts if at in self.finished)

    @property
    def generated_tokens(self) -> int:
        return sum(finish.usage.generated_tokens for finish in self.finished.values())

    async def next(self, timeout: float | None = None) -> list[Event] | None:
        """Everything that arrived since the last call; [] after `timeout` seconds without news, None at the end.

        Raises the error of the first sequence that failed, after all events before it.
        """
        while not self._events and self._error is None and not self._complete:
            if not await self._waiter.wait(timeout):
                return []
        if self._events:
            events, self._events = self._events, []
            return events
        if self._error is not None:
            raise self._error
        return None

    # -- the sequences

    def start(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            running = _Running(self, sequence)
            self._owner.submit(sequence.request, running)
            self._open.add(running)

    async def close(self) -> None:
        """Cancels what still runs, and waits for it. Idempotent."""
        for running in list(self._open):
            self._cancel(running)
        while any(running.sequence.choice not in self.finished for running in self._open):
            await self._waiter.wait(None)
        self._waiter.close()
        self._release()

    def take(self, running: _Running, update: Update) -> None:
        """News from the engine. Whatever fails here, fails this request only."""
        if not running.over:
            try:
                self._observe(running, update)
                finish = running.sequence.read(update, self._events)
                if finish is not None:
                    running.over = True
                    self.finished[finish.choice] = finish
                    self._events.append(finish)
                    self.timings.finished = time.monotonic()
            except LoraxError as error:
                self._fail(running, error)
            except Exception:
                log.exception("request %s failed", running.sequence.request.id)
                self._fail(running, LoraxError("internal error", hint="see the server's log"))
            self._waiter.wake()
        if update.is_last:
            self._ended(running)
        elif running.over:
            self._cancel(running)

    def lose(self, running: _Running, error: LoraxError) -> None:
        """The engine is gone."""
        if not running.over:
            self._fail(running, error)
        self._ended(running)

    def _observe(self, running: _Running, update: Update) -> None:
        """Notes when things happened."""
        timings = self.timings
        if update.admitted is not None and timings.admitted is None:
            timings.admitted = update.admitted
        if update.tokens:
            now = time.monotonic()
            if running.last:
                self._owner.metrics.tokens(len(update.tokens), now - running.last)
            elif timings.first_token is None:
                timings.first_token = now
                self._owner.metrics.first_token(now - timings.received)
            running.last = now

    def _fail(self, running: _Running, error: LoraxError) -> None:
        running.over = True
        self._error = self._error or error

    def _cancel(self, running: _Running) -> None:
        if not running.cancelled:
            running.over = running.cancelled = True
            self._owner.backend.cancel(running.sequence.request.id)

    def _ended(self, running: _Running) -> None:
        self._open.remove(running)
        self._owner.ended()
        self._release()
        self._waiter.wake()

    def _release(self) -> None:
        """Gives the adapter back once the engine has let go of every sequence."""
        if self._lease is not None and not self._open:
            self._lease.release()
            self._lease = None


@dataclass(slots=True)
class Generator:
    """Opens generations on one backend."""

    backend: Backend
    text: Text
    config: EngineConfig
    metrics: Metrics
    limits: Limits = field(init=False)
    max_characters: int = field(init=False)  # of a prompt
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # the engine works on nothing
    num_open: int = 0  # sequences that the engine has not let go of

    def __post_init__(self) -> None:
        self.limits = Limits.of(self.backend.info, self.config)
        longest = NORMALISED * self.text.longest_token
        self.max_characters = self.limits.max_input_length * longest
        self.idle.set()

    def submit(self, request: Request, reader: Reader) -> None:
        self.backend.submit(request, reader)
        self.num_open += 1
        self.idle.clear()

    def ended(self) -> None:
        self.num_open -= 1
        if not self.num_open:
            self.idle.set()

    @asynccontextmanager
    async def open(
        self, prompts: list[Prompt], parameters: Parameters, id: str | None = None
    ) -> AsyncIterator[Generation]:
        """Checks, tokenizes, gets the adapter and starts; the generation is closed on the way out.

        Raises InvalidRequest, AdapterError and EngineDead.
        """
        timings = Timings(time.monotonic())
        check(parameters, self.limits)
        if len(prompts) * parameters.best_of > self.limits.max_sequences:
            raise invalid(
                parameters.name("inputs"),
                f"makes {len(prompts) * parameters.best_of} sequences, "
                f"at most {self.limits.max_sequences} are allowed",
                "send several requests",
            )
        tokens = [await self._tokenize(prompt, parameters) for prompt in prompts]
        timings.validated = time.monotonic()
        lease: Lease | None = None
        if parameters.adapter is not None:
            lease = await self.backend.acquire(parameters.adapter, parameters.api_token)
        self.metrics.adapter(parameters.adapter.name if parameters.adapter else "base")
        generation = Generation(id or uuid.uuid4().hex, parameters, tokens, lease, timings, self)
        try:
            generation.start(self._sequences(generation, lease))
            yield generation
        finally:
            await generation.close()

    def _sequences(self, generation: Generation, lease: Lease | None) -> list[Sequence]:
        parameters = generation.parameters
        made: list[Sequence] = []
        for tokens in generation.prompts:
            room = self.limits.max_total_tokens - len(tokens)
            for seed in parameters.seeds():
                request = Request(
                    id=f"{generation.id}-{len(made)}",
                    tokens=tokens,
                    sampling=parameters.sampling(seed, self.limits),
                    max_new_tokens=parameters.max_new_tokens or room,
                    eos_token_ids=[] if parameters.ignore_eos else self.text.eos_token_ids,
                    adapter=lease.image if lease else None,
                    cache_salt=lease.cache_salt if lease else b"",
                    arrival=generation.timings.received,
                )
                made.append(
                    Sequence(
                        choice=len(made),
                        request=request,
                        seed=None if parameters.greedy else seed,
                        text=self.text,
                        stream=self.text.stream(tokens),
                        stops=StopMatcher(parameters.stop, keep=parameters.keep_stop),
                    )
                )
        return made

    def _check_length(self, characters: int, parameters: Parameters) -> None:
        """Raises InvalidRequest for what is too long whatever its tokens are: to find them takes time and memory."""
        if characters > self.max_characters:
            raise invalid(
                parameters.name("inputs"),
                f"has {characters} characters, more than the {self.limits.max_input_length} tokens that are allowed",
                "shorten it",
            )

    async def _tokenize(self, prompt: Prompt, parameters: Parameters) -> list[int]:
        """The tokens of one prompt that go in; raises InvalidRequest if they do not fit."""
        if isinstance(prompt, str):
            if parameters.truncate:  # what a token at the cut becomes is cut off too
                prompt = prompt[-self.max_characters :]
            self._check_length(len(prompt), parameters)
            tokens = await self.text.encode(prompt, special=parameters.special)
        elif prompt and isinstance(prompt[0], dict):
            self._check_length(characters(prompt), parameters)
            tokens = await self.text.encode_chat(prompt)
        else:
            tokens = cast(list[int], prompt)
        await asyncio.sleep(0)  # between the prompts of one request it is the others' turn
        if parameters.truncate:
            tokens = tokens[-parameters.truncate :]
        check_prompt(tokens, parameters, self.limits)
        return tokens
