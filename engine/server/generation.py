"""From checked parameters to a stream of events: the one pipeline behind every route, and the command line in-process.

    async with generator.open([prompt], parameters) as generation:
        while (events := await generation.next()) is not None:
            ...

A generation is one request of a client: its prompts, each continued `best_of` times, all with one adapter. Every
sequence has a task that turns the engine's updates into events; whoever reads gets all that have arrived at once.
Leaving the block cancels what still runs. The adapter's lease ends with the last sequence, whatever becomes of the
reader; a sequence that ends at a stop sequence is answered while the engine still lets go of it.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from msgspec import Struct

from engine.config import EngineConfig
from engine.errors import GenerationError, LoraxError, from_wire
from engine.messages import Request, TokenOutput, Update, Usage
from engine.metrics import Metrics
from engine.server.backend import Backend, Lease
from engine.server.parameters import Limits, Parameters, check, check_prompt, invalid
from engine.server.stops import StopMatcher
from engine.server.text import Text, TextStream
from engine.server.waiting import Waiter

log = logging.getLogger(__name__)

FinishedBy = Literal["length", "eos_token", "stop_sequence"]
Prompt = str | list[int] | list[dict[str, Any]]  # text, tokens, or a conversation


class Token(Struct):
    """One generated token. `text` is its own, a special token's name included.

    `delta` is what the answer grows by: none for special tokens, and none while a stop sequence may be beginning.
    """

    choice: int
    id: int
    text: str
    delta: str
    logprob: float | None
    alternatives: list[tuple[int, float]] | None
    special: bool


class PromptLogprobs(Struct):
    """The log-probabilities of every prompt token but the first; comes before a choice's first token."""

    choice: int
    logprobs: list[float]


class Finish(Struct):
    """The end of one choice. `delta` is text that no token brought; `text` the whole answer."""

    choice: int
    reason: FinishedBy
    delta: str
    text: str
    usage: Usage
    mean_logprob: float
    seed: int | None  # None: greedy


Event = Token | PromptLogprobs | Finish


@dataclass(slots=True)
class Timings:
    """When things happened, by time.monotonic()."""

    received: float
    validated: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    finished: float = 0.0


@dataclass(slots=True)
class _Sequence:
    """What the front keeps of one sequence while it runs."""

    choice: int
    request: Request
    seed: int | None
    stream: TextStream
    stops: StopMatcher
    parts: list[str] = field(default_factory=list)
    num_tokens: int = 0
    logprobs: float = 0.0
    last: float = 0.0  # when the newest token came

    def end(self) -> str:
        """The text that was held back, now that no more tokens come."""
        tail = self.stops.push(self.stream.flush())
        if self.stops.matched is None:
            tail += self.stops.flush()
        self.parts.append(tail)
        return tail


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
        self.finished: dict[int, Finish] = {}
        self._owner = owner
        self._lease = lease
        self._events: list[Event] = []
        self._error: LoraxError | None = None
        self._waiter = Waiter()
        self._tasks: dict[int, asyncio.Task[None]] = {}  # choice -> its task, until it ends

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

    # -- the tasks

    def start(self, sequences: Sequence[_Sequence]) -> None:
        for sequence in sequences:
            task = asyncio.create_task(self._run(sequence), name=f"generate {sequence.request.id}")
            self._tasks[sequence.choice] = task
            self._owner.tasks.add(task)
            task.add_done_callback(functools.partial(self._ended, sequence.choice))

    async def close(self) -> None:
        """Cancels what still runs, and waits for it. Idempotent."""
        self._waiter.close()
        running = [task for choice, task in self._tasks.items() if choice not in self.finished]
        for task in running:
            task.cancel()
        if running:
            await asyncio.wait(running)
        self._release()

    def _ended(self, choice: int, task: asyncio.Task[None]) -> None:
        self._owner.tasks.discard(task)
        del self._tasks[choice]
        self._release()
        self._waiter.wake()

    def _release(self) -> None:
        """Gives the adapter back once the engine has let go of every sequence."""
        if self._lease is not None and not self._tasks:
            self._lease.release()
            self._lease = None

    async def _run(self, sequence: _Sequence) -> None:
        """Reads one sequence to its end. A task boundary: whatever fails, fails this request only."""
        try:
            updates = cast(
                AsyncGenerator[Update, None], self._owner.backend.generate(sequence.request)
            )
            async with aclosing(updates):
                async for update in updates:
                    finish = self._take(sequence, update)
                    if finish is not None:
                        self.finished[finish.choice] = finish
                        self._events.append(finish)
                        self.timings.finished = time.monotonic()
                    self._waiter.wake()
                    if finish is not None:
                        return
            raise GenerationError("the engine ended the request without a result")
        except LoraxError as error:
            self._error = self._error or error
        except Exception:
            log.exception("request %s failed", sequence.request.id)
            self._error = self._error or LoraxError("internal error", hint="see the server's log")

    def _take(self, sequence: _Sequence, update: Update) -> Finish | None:
        """Turns an update into events; the Finish if it was the last, or if a stop sequence was found."""
        if update.error is not None:
            raise from_wire(update.error)
        timings, now = self.timings, time.monotonic()
        if update.admitted is not None and timings.admitted is None:
            timings.admitted = update.admitted
        if update.prompt_logprobs is not None:
            self._events.append(PromptLogprobs(sequence.choice, update.prompt_logprobs))
        if update.tokens:
            if sequence.num_tokens:
                self._owner.metrics.tokens(len(update.tokens), now - sequence.last)
            elif timings.first_token is None:
                timings.first_token = now
                self._owner.metrics.first_token(now - timings.received)
            sequence.last = now
        ends = update.finish == "eos"
        token: Token | None = None
        for index, output in enumerate(update.tokens, 1):
            token = self._read(sequence, output, ends and index == len(update.tokens))
            self._events.append(token)
            if sequence.stops.matched is not None:
                return self._finish_of(sequence, "stop_sequence", None)
        if update.finish is None:
            return None
        if update.finish == "cancelled":
            raise GenerationError("the engine cancelled the request")
        tail = sequence.end()
        if token is not None:
            token.delta += tail
            tail = ""
        reason: FinishedBy = "eos_token" if ends else "length"
        matched = sequence.stops.matched is not None
        return self._finish_of(
            sequence, "stop_sequence" if matched else reason, update.usage, delta=tail
        )

    def _read(self, sequence: _Sequence, output: TokenOutput, ends: bool) -> Token:
        id, text = output.token, self._owner.text
        special = id in text.special_ids or (ends and id in sequence.request.eos_token_ids)
        piece = "" if special else sequence.stream.push(id)
        delta = sequence.stops.push(piece) if piece else ""
        sequence.num_tokens += 1
        sequence.logprobs += output.logprob or 0.0
        if delta:
            sequence.parts.append(delta)
        own = text.token_text(id) if special else piece
        if special and own in self.parameters.stop:  # a stop sequence may name a special token
            delta = sequence.end()
            sequence.stops.matched = own
        return Token(sequence.choice, id, own, delta, output.logprob, output.alternatives, special)

    def _finish_of(
        self, sequence: _Sequence, reason: FinishedBy, usage: Usage | None, delta: str = ""
    ) -> Finish:
        num_tokens = sequence.num_tokens
        return Finish(
            choice=sequence.choice,
            reason=reason,
            delta=delta,
            text="".join(sequence.parts),
            usage=usage or Usage(len(sequence.request.tokens), 0, num_tokens),
            mean_logprob=sequence.logprobs / max(1, num_tokens),
            seed=sequence.seed,
        )


@dataclass(slots=True)
class Generator:
    """Opens generations on one backend."""

    backend: Backend
    text: Text
    config: EngineConfig
    metrics: Metrics
    limits: Limits = field(init=False)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)  # of every open sequence

    def __post_init__(self) -> None:
        self.limits = Limits.of(self.backend.info, self.config)

    @asynccontextmanager
    async def open(
        self, prompts: Sequence[Prompt], parameters: Parameters, id: str | None = None
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

    def _sequences(self, generation: Generation, lease: Lease | None) -> list[_Sequence]:
        parameters = generation.parameters
        made: list[_Sequence] = []
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
                    _Sequence(
                        choice=len(made),
                        request=request,
                        seed=None if parameters.greedy else seed,
                        stream=self.text.stream(tokens),
                        stops=StopMatcher(parameters.stop, keep=parameters.keep_stop),
                    )
                )
        return made

    async def _tokenize(self, prompt: Prompt, parameters: Parameters) -> list[int]:
        """The tokens of one prompt that go in; raises InvalidRequest if they do not fit."""
        if isinstance(prompt, str):
            tokens = await self.text.encode(prompt, special=parameters.special)
        elif prompt and isinstance(prompt[0], dict):
            tokens = await self.text.encode_chat(prompt)
        else:
            tokens = cast(list[int], prompt)
        await asyncio.sleep(0)  # between the prompts of one request it is the others' turn
        if parameters.truncate:
            tokens = tokens[-parameters.truncate :]
        check_prompt(tokens, parameters, self.limits)
        return tokens
