"""A backend that says what a test tells it to, and counts what it is asked for."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp.test_utils import TestClient
from msgspec.structs import replace
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from engine.adapters.ref import AdapterRef
from engine.adapters.sources import token_hash
from engine.backend import Reader
from engine.errors import AdapterNotFound, EngineDead, InvalidRequest, LoraxError
from engine.messages import (
    NO_TENANT,
    AdapterImageRef,
    AdapterStatus,
    AdapterText,
    EngineInfo,
    EngineStats,
    FinishReason,
    Request,
    TenantRef,
    Tier,
    TierStats,
    TokenOutput,
    Update,
    Usage,
    is_meant,
)
from engine.server.text import Text
from tests.engine_info import INFO

SPECIAL = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
EOS = 1
CORPUS = [
    "Hello world, how are you today? The quick brown fox jumps over the lazy dog.",
    "Grüße aus München: ä ö ü ß é è ê ñ. Ça va? Être ou ne pas être.",
    "日本語のテキスト。漢字とかな。中文字符。한국어 텍스트",
    "😀 😃 👨‍👩‍👧 🎉🎉 ❤️ emoji everywhere 🚀",
    "def main():\n    return {'a': [1, 2, 3]}\n\nUser: hi\nAssistant: hello\n",
]
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'forbidden' %}"
    "{{ raise_exception('role ' + m['role'] + ' is not allowed') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_tokenizer(folder: Path, *, chat: bool = True) -> Path:
    """A byte-level BPE tokenizer of a few hundred tokens: most characters beyond ASCII take several."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE if chat else None
    fast.save_pretrained(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 3]}')
    return folder


def write_sentencepiece(folder: Path) -> Path:
    """Like Llama 2: words begin with a mark for the space, unknown characters fall back to bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2}
    vocab |= {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in ["▁", *"abcdefghijklmnopqrstuvwxyzé", "▁h", "▁w"]:
        vocab[piece] = len(vocab)
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=[("▁", "h"), ("▁", "w")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return folder


@dataclass
class FakeLease:
    image: AdapterImageRef
    backend: FakeBackend
    cache_salt: bytes = b""
    text: AdapterText | None = None
    tier: Tier = "host"
    num_released: int = 0
    too_early: bool = False  # the engine was still using it

    def release(self) -> None:
        self.num_released += 1
        self.too_early |= any(it.adapter is self.image for it in self.backend.open.values())


@dataclass
class FakeBackend:
    """`answer` gives a request's tokens; the sequence ends there, with EOS if `finish` is eos."""

    text: Text
    answer: Callable[[Request], list[int]] | None = None
    finish: FinishReason = "eos"
    found_in: str = "hub"  # where adapters are that name no source
    delay: float = 0.0  # before every update
    first_delay: float = 0.0
    gate: asyncio.Event | None = None  # before the first update
    burst: int = 1  # tokens of one update
    bare_finish: bool = False  # the last update has no tokens
    fail_after: int | None = None  # updates, after which the request fails
    failure: LoraxError = field(default_factory=lambda: EngineDead("the engine died"))
    private: set[str] = field(default_factory=set)  # ids that one tenant's token opens
    adapter_errors: dict[str, LoraxError] = field(default_factory=dict)
    adapter_texts: dict[str, AdapterText] = field(default_factory=dict)
    adapter_vocab: int = 0  # of adapters with a text
    acquire_delay: float = 0.0
    info: EngineInfo = INFO
    stats: EngineStats = EngineStats()
    tier_stats: TierStats = TierStats()
    statuses: list[AdapterStatus] = field(default_factory=list)  # listed besides those acquired
    in_host: dict[str, AdapterImageRef] = field(default_factory=dict)
    device_calls: list[tuple[str, bytes]] = field(default_factory=list)  # pin, unpin, drop
    alive: bool = True
    exchange_away: bool = False
    exchange_restarts: int = 0
    requests: list[Request] = field(default_factory=list)
    let_go: float = 0.0  # until a cancelled request has ended
    open: dict[str, Request] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)
    stops: dict[str, asyncio.Event] = field(default_factory=dict)
    cancelled: list[str] = field(default_factory=list)
    leases: list[FakeLease] = field(default_factory=list)
    acquired: list[tuple[AdapterRef, str | None]] = field(default_factory=list)
    tenants: list[TenantRef] = field(default_factory=list)  # of `acquired`
    waiting_acquires: int = 0

    def say(self, text: str) -> None:
        ids = self.text._tokenizer.encode(text, add_special_tokens=False).ids
        self.answer = lambda request: list(ids)

    def _tokens(self, request: Request) -> list[int]:
        if self.answer is not None:
            return self.answer(request)
        chosen = random.Random(f"{request.tokens} {request.sampling.seed}")
        return [chosen.randrange(4, 400) for _ in range(chosen.randrange(5, 30))]

    def _output(self, request: Request, token: int) -> TokenOutput:
        sampling = request.sampling
        logprob = -0.01 * (1 + (token * 7 + sampling.seed) % 300)
        alternatives = [(4 + index, -0.5 - index) for index in range(sampling.num_alternatives)]
        return TokenOutput(
            token,
            logprob if sampling.logprobs else None,
            alternatives if sampling.num_alternatives else None,
        )

    def submit(self, request: Request, reader: Reader) -> None:
        if not self.alive:
            raise EngineDead("the engine died")
        assert request.id not in self.open
        self.requests.append(request)
        self.open[request.id] = request
        if (image := request.adapter) is not None:
            name = "private" if image.tenant else image.name
            newest = (name, image.digest, image.data_bytes)
            kept = [one for one in self.stats.resident if one[1] != image.digest]
            self.stats = replace(self.stats, resident=[*kept, newest])
        self.stops[request.id] = asyncio.Event()
        self.tasks[request.id] = asyncio.create_task(self._answer(request, reader))

    def cancel(self, id: str) -> None:
        assert id in self.open and id not in self.cancelled
        self.cancelled.append(id)
        self.stops[id].set()

    async def _answer(self, request: Request, reader: Reader) -> None:
        """Tells the reader all, or that it was cancelled; the request is open until just before the last word."""
        telling = asyncio.create_task(self._tell(request, reader))
        stopped = asyncio.create_task(self.stops[request.id].wait())
        await asyncio.wait({telling, stopped}, return_when=asyncio.FIRST_COMPLETED)
        stopped.cancel()
        if telling.done():
            last = telling.result()
        else:
            telling.cancel()
            await asyncio.sleep(self.let_go)
            last = Update(request.id, [], finish="cancelled")
        del self.open[request.id], self.tasks[request.id], self.stops[request.id]
        if isinstance(last, EngineDead):
            reader.on_engine_lost(last)
        else:
            reader.take(last)

    async def _tell(self, request: Request, reader: Reader) -> Update | EngineDead:
        """All but the last word, which is returned."""
        try:
            async for update in self._updates(request):
                if update.finish is not None:
                    return update
                reader.take(update)
        except EngineDead as error:
            return error
        except LoraxError as error:
            return Update(request.id, [], error=error.to_wire())
        raise AssertionError("an answer has an end")

    async def _updates(self, request: Request) -> AsyncIterator[Update]:
        wanted = self._tokens(request)
        tokens, finish = wanted[: request.max_new_tokens], self.finish
        if finish == "eos":
            if len(wanted) < request.max_new_tokens and request.eos_token_ids:
                tokens = [*tokens, EOS]
            else:
                finish = "length"
        outputs = [self._output(request, token) for token in tokens]
        groups = [outputs[i : i + self.burst] for i in range(0, len(outputs), self.burst)]
        if self.bare_finish or not groups:
            groups.append([])
        await asyncio.sleep(self.first_delay)
        if self.gate is not None:
            await self.gate.wait()
        for index, group in enumerate(groups):
            if self.fail_after == index:
                raise self.failure
            await asyncio.sleep(self.delay)
            ended = index == len(groups) - 1
            prompt = [-0.1 * at for at in range(1, len(request.tokens))]
            yield Update(
                request.id,
                group,
                finish=finish if ended else None,
                usage=Usage(len(request.tokens), 2, len(tokens)) if ended else None,
                cached_tokens=0 if index else 2,
                admitted=time.monotonic() if index == 0 else None,
                prompt_logprobs=prompt if index == 0 and request.sampling.prompt_logprobs else None,
                prompt_tops=[(4, -0.05)] * len(prompt),
            )

    async def acquire(
        self, ref: AdapterRef, token: str | None, tenant: TenantRef = NO_TENANT
    ) -> FakeLease:
        self.acquired.append((ref, token))
        self.tenants.append(tenant)
        self.waiting_acquires += 1
        try:
            await asyncio.sleep(self.acquire_delay)
        finally:
            self.waiting_acquires -= 1
        if ref.id in self.adapter_errors:
            raise self.adapter_errors[ref.id]
        if ref.source not in (None, "hub", "local"):  # as engine.adapters.registry
            raise InvalidRequest(
                f"this server has no adapter_source {ref.source!r}", field="adapter_source"
            )
        if ref.id == "missing":
            raise AdapterNotFound(f"no adapter {ref.id!r}", field="adapter_id")
        image = AdapterImageRef(
            digest=ref.id.encode(),
            offset=0,
            data_bytes=64,
            stacked_rank=8,
            name=ref.name,
            source=ref.source or self.found_in,
            merged=ref.recipe is not None,
            vocab=self.adapter_vocab if ref.id in self.adapter_texts else 0,
            tenant=token_hash(token) if ref.id in self.private and token else b"",
        )
        tier: Tier = "host" if image.name in self.in_host else "source"
        lease = FakeLease(image, self, b"salt", self.adapter_texts.get(ref.id), tier)
        self.leases.append(lease)
        self.in_host[image.name] = image
        return lease

    async def adapters(self) -> list[AdapterStatus]:
        held = Counter(lease.image.name for lease in self.leases if not lease.num_released)
        return self.statuses + [
            AdapterStatus(
                name=image.name,
                source=image.source,
                digest=image.digest,
                state="ready",
                data_bytes=64,
                stacked_rank=8,
                targets=["q_proj"],
                base_model=None,
                leases=held[image.name],
                seconds={"fetch": 0.5, "parse": 0.1},
                merged=image.merged,
                tenant=image.tenant,
                revision="r1",
                ranks=[4, 8],
            )
            for image in self.in_host.values()
        ]

    def pin(self, digest: bytes, pinned: bool) -> None:
        self.device_calls.append(("pin" if pinned else "unpin", digest))

    def drop(self, digest: bytes) -> None:
        self.device_calls.append(("drop", digest))
        resident = [one for one in self.stats.resident if one[1] != digest]
        self.stats = replace(self.stats, resident=resident)

    async def unload(
        self, name: str, source: str | None = None, tenants: Collection[bytes] | None = None
    ) -> list[bytes]:
        image = self.in_host.get(name)
        if image is None or not is_meant(image, name, source, tenants):
            return []
        return [self.in_host.pop(name).digest]

    async def tiers(self) -> TierStats:
        return self.tier_stats

    async def close(self) -> None:
        self.alive = False

    def check_idle(self) -> None:
        """Nothing is open, and every lease was given back."""
        assert not self.open
        assert not self.waiting_acquires
        assert all(lease.num_released and not lease.too_early for lease in self.leases)


def events_of(raw: bytes) -> list[str]:
    """The data of every event of a stream."""
    lines = raw.decode().split("\n\n")
    assert lines[-1] == ""
    return [line.removeprefix("data:").strip() for line in lines[:-1] if line.startswith("data:")]


Json = dict[str, Any]
Start = Callable[..., Awaitable[TestClient]]  # of the fixture `start`
