"""From parameters to a stream of events: the pipeline of every response format.

    async with generator.open([prompt], parameters) as generation:
        while (events := await generation.next()) is not None:
            ...

A generation is one request of a client: its prompts, each continued `best_of` times, all with one adapter. The engine's
updates become events when they arrive, and `next` returns all that have arrived. Leaving the block cancels sequences
that still run. The adapter's lease is released when the engine has dropped the last sequence, whether or not the events
were read. The end of a choice at a stop sequence is an event before the engine has dropped the sequence.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field

from engine.backend import Backend, Lease, Reader
from engine.config import EngineConfig
from engine.errors import LoraxError
from engine.messages import Request, Update
from engine.metrics import Metrics
from engine.server.adapter_texts import AdapterTexts
from engine.server.adapter_use import AdapterUse
from engine.server.aliases import Aliases
from engine.server.choice import Choice
from engine.server.events import Event, Finish, FinishedChoice, PromptLogprobs, Token
from engine.server.grammars import Checks
from engine.server.keys import Tenant
from engine.server.open_requests import OpenRequests
from engine.server.parameters import Limits, Parameters, check, invalid, priority_of
from engine.server.prompts import Prompt, tokenized_all
from engine.server.reading import Reading, reading_of
from engine.server.salts import salt_of
from engine.server.static import acquire, own_text
from engine.server.stops import StopMatcher
from engine.server.text import Text
from engine.server.token_rules import check_rules
from engine.server.waiting import Waiter

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Timings:
    """Times by time.monotonic()."""

    received: float
    validated: float = 0.0
    admitted: float | None = None
    first_token: float | None = None
    finished: float = 0.0


@dataclass(slots=True, eq=False)
class _Running:
    """A choice that the engine works on, and the reader of its updates."""

    generation: Generation
    choice: Choice
    last: float = 0.0  # when the newest token came
    done: bool = False  # finished, failed or cancelled: later updates are ignored
    cancelled: bool = False  # the engine was asked to drop it

    def take(self, update: Update) -> None:
        """See `Reader`."""
        self.generation.take(self, update)

    def on_engine_lost(self, error: LoraxError) -> None:
        """See `Reader`."""
        self.generation.on_engine_lost(self, error)


class Generation:
    """An open request. `Generator.open` makes it."""

    def __init__(
        self,
        id: str,
        parameters: Parameters,
        prompts: list[list[int]],
        lease: Lease | None,
        text: Text,
        reading: Reading,
        timings: Timings,
        owner: Generator,
    ) -> None:
        self.id = id
        self.text = text
        self.reading = reading
        self.parameters = parameters
        self.prompts = prompts  # tokens of every prompt
        self.timings = timings
        self.adapter_source = lease.image.source if lease is not None else ""
        self.is_private = lease is not None and bool(lease.image.tenant)
        self.finished: dict[int, Finish] = {}
        self._owner = owner
        self._lease = lease
        self._events: list[Event] = []
        self._error: LoraxError | None = None
        self._waiter = Waiter()
        self._open: set[_Running] = set()  # the engine has not dropped these

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
        """All events since the last call; [] after `timeout` seconds without any, None at the end.

        Raises the error of the first choice that failed, after all earlier events.
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

    async def collect(self) -> list[FinishedChoice]:
        """Waits for the end; every choice, in order. Raises as `next`."""
        tokens: list[list[Token]] = [[] for _ in range(self.num_choices)]
        prompts: dict[int, PromptLogprobs] = {}
        while (events := await self.next()) is not None:
            for event in events:
                if isinstance(event, Token):
                    tokens[event.choice].append(event)
                elif isinstance(event, PromptLogprobs):
                    prompts[event.choice] = event
        return [
            FinishedChoice(self.finished[index], tokens[index], prompts.get(index))
            for index in range(self.num_choices)
        ]

    # -- the choices

    def start(self, choices: Iterable[Choice]) -> None:
        for choice in choices:
            running = _Running(self, choice)
            self._owner.submit(choice.request, running)
            self._open.add(running)

    async def close(self) -> None:
        """Cancels running sequences and waits until the engine has dropped them. Idempotent."""
        for running in list(self._open):
            self._cancel(running)
        while any(running.choice.index not in self.finished for running in self._open):
            await self._waiter.wait(None)
        self._waiter.close()
        self._release()

    def take(self, running: _Running, update: Update) -> None:
        """Reads an update. An error here fails only this request."""
        if not running.done:
            try:
                self._observe(running, update)
                finish = running.choice.read(update, self._events)
                if finish is not None:
                    running.done = True
                    self.finished[finish.choice] = finish
                    self._events.append(finish)
                    self.timings.finished = time.monotonic()
            except LoraxError as error:
                self._fail(running, error)
            except Exception:
                log.exception("request %s failed", running.choice.request.id)
                self._fail(running, LoraxError("internal error", hint="see the server's log"))
            self._waiter.wake()
        if update.is_last:
            self._ended(running)
        elif running.done:
            self._cancel(running)

    def on_engine_lost(self, running: _Running, error: LoraxError) -> None:
        """The engine is gone; no more updates come."""
        if not running.done:
            self._fail(running, error)
        self._ended(running)

    def _observe(self, running: _Running, update: Update) -> None:
        """Records times."""
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
        running.done = True
        self._error = self._error or error

    def _cancel(self, running: _Running) -> None:
        if not running.cancelled:
            running.done = running.cancelled = True
            self._owner.backend.cancel(running.choice.request.id)

    def _ended(self, running: _Running) -> None:
        self._open.remove(running)
        self._owner.ended()
        self._release()
        self._waiter.wake()

    def _release(self) -> None:
        """Releases the adapter once the engine has dropped every sequence."""
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
    aliases: Aliases = field(default_factory=Aliases)
    checks: Checks = field(default_factory=Checks)
    limits: Limits = field(init=False)
    texts: AdapterTexts = field(init=False)
    requests: OpenRequests = field(init=False)
    use: AdapterUse = field(init=False)
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # the engine has no sequence
    num_open: int = 0  # sequences that the engine has not dropped

    def __post_init__(self) -> None:
        self.limits = Limits.of(self.backend.info, self.config)
        self.requests = OpenRequests(self.config.adapters.max_requests_per_adapter)
        self.texts = AdapterTexts(self.text)
        self.use = AdapterUse(self.backend, self.metrics)
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
        self,
        prompts: Sequence[Prompt],
        parameters: Parameters,
        id: str | None = None,
        tenant: Tenant | None = None,
    ) -> AsyncIterator[Generation]:
        """Checks, acquires the adapter, tokenizes and starts. Leaving the block closes the generation.

        `tenant`: of the server's key. Raises InvalidRequest, AdapterError and EngineDead.
        """
        timings = Timings(time.monotonic())
        await self._check(len(prompts), parameters, tenant)
        started = time.monotonic()
        adapter, lease, counted = None, None, ExitStack()
        if parameters.adapter is not None:
            adapter = self.aliases.resolve(parameters.adapter)
            counted.enter_context(self.requests.counted(adapter))
        generation: Generation | None = None
        try:
            if adapter is not None:
                lease = await acquire(self.backend, adapter, parameters.api_token, tenant)
            own = own_text(self.backend, lease)
            text = self.text if own is None else await self.texts.of(own)
            waited = time.monotonic() - started
            vocab_size = lease.image.vocab if lease is not None else 0
            tokens = await tokenized_all(prompts, parameters, self.limits, text, vocab_size)
            parser = self.config.server.tool_call_parser
            reading, parameters = await reading_of(prompts, tokens, parameters, text, parser)
            # As if the adapter had been acquired afterwards: its load is part of the time in the queue.
            timings.validated = time.monotonic() - waited
            self.use.count(parameters.adapter, lease)
            generation = Generation(
                id=id or uuid.uuid4().hex,
                parameters=parameters,
                prompts=tokens,
                lease=lease,
                text=text,
                reading=reading,
                timings=timings,
                owner=self,
            )
            generation.start(self._choices(generation, lease, tenant))
            yield generation
        finally:
            if generation is not None:
                await generation.close()
            elif lease is not None:
                lease.release()
            counted.close()

    async def _check(self, num_prompts: int, parameters: Parameters, tenant: Tenant | None) -> None:
        """Everything that depends neither on the adapter nor on a prompt. Raises InvalidRequest."""
        check(parameters, self.limits)
        check_rules(parameters)
        priority_of(parameters, tenant.priority if tenant else 0)
        if num_prompts * parameters.best_of > self.limits.max_sequences:
            raise invalid(
                parameters.name("inputs"),
                f"makes {num_prompts * parameters.best_of} sequences, "
                f"the limit is {self.limits.max_sequences} (--max-concurrent-requests)",
                "split it into several requests",
            )
        if parameters.grammar is not None:
            await self.checks.check(parameters.grammar, parameters.name("grammar"))

    def _choices(
        self, generation: Generation, lease: Lease | None, tenant: Tenant | None
    ) -> list[Choice]:
        parameters, text = generation.parameters, generation.text
        sharing = tenant if self.config.server.prefix_cache_per_tenant else None
        salt = salt_of(lease.cache_salt if lease else b"", parameters.cache_salt, sharing)
        priority = priority_of(parameters, tenant.priority if tenant else 0)
        made: list[Choice] = []
        behind, shown = 0, generation.reading.shown
        for tokens in generation.prompts:
            new = parameters.max_new_tokens or self.limits.max_total_tokens - len(tokens)
            ends = parameters.ends(text.eos_token_ids)
            for seed in parameters.seeds():
                request = Request(
                    id=f"{generation.id}-{len(made)}",
                    tokens=tokens,
                    sampling=parameters.sampling(seed, self.limits, ends),
                    max_new_tokens=new,
                    eos_token_ids=ends,
                    adapter=lease.image if lease else None,
                    cache_salt=salt,
                    arrival=generation.timings.received,
                    group=generation.id,
                    behind=behind,
                    tenant=tenant.name if tenant else "",
                    weight=tenant.weight if tenant else 1.0,
                    priority=priority,
                    grammar=parameters.grammar or "",
                )
                behind += len(tokens) + new
                made.append(
                    Choice(
                        index=len(made),
                        request=request,
                        seed=None if parameters.greedy else seed,
                        text=text,
                        stream=text.stream(tokens, skip_special=not shown),
                        stops=StopMatcher(parameters.stop, keep=parameters.keep_stop),
                        score_only=parameters.score_only,
                        shown=shown,
                    )
                )
        return made
