"""Attention backends in a whole engine: on a CPU over stand-ins for their packages, on a GPU over the packages."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from engine.config import EngineConfig, ModelConfig
from engine.errors import ConfigError
from engine.messages import Request
from engine.models import spec_from
from engine.ops import attention
from engine.ops.attention import AttentionBackend, Gpu, KVFormat, Needs
from engine.ops.attention.builtin import Builtin
from engine.ops.attention.flash_attention import FlashAttention
from engine.ops.attention.flashinfer import FlashInfer
from engine.platform import Platform
from engine.runner.memory import SCORED_BYTES, Footprint, MemoryPlan, plan_memory
from tests.engine.harness import Harness, Outcome, config_of, request
from tests.ops import fake_attention
from tests.runner.twins import Twins, make_scene, small_config
from tests.tiny import CONFIGS, SMALL, VOCAB, make_adapter, make_model

MIB = 1 << 20
FOOTPRINT = Footprint(
    itemsize=2,
    kv=KVFormat(torch.bfloat16),
    weights=MIB,
    scratch=0,
    widest_output=192,  # of SMALL: gate and up
    widest_input=96,
    records=1024,
    host_tier=MIB,
)
PACKAGES = {"flashinfer": "flashinfer", "flash-attn": "flash_attn"}
HOPPER = Gpu((9, 0), 132)


def with_backend(config: EngineConfig, name: str) -> EngineConfig:
    return replace(config, memory=replace(config.memory, attention_backend=name))  # type: ignore[arg-type]


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages' backends serve the CPU in float32, over the stand-ins."""
    makers: dict[str, Callable[[Needs], AttentionBackend]] = {
        "flashinfer": lambda needs: FlashInfer(
            replace(needs, gpu=HOPPER), fake_attention.flashinfer, fake_attention.Mark
        ),
        "flash-attn": lambda needs: FlashAttention(needs, fake_attention.flash_attn),
    }
    for name, make in makers.items():
        monkeypatch.setitem(attention.BACKENDS, name, (lambda needs: None, make))


def requests(harness: Harness, adapter: Path) -> list[Request]:
    """Prompts of 3 to 80 tokens, every other one on an adapter."""
    image = harness.stage(adapter)
    generator = torch.Generator().manual_seed(5)
    prompts = torch.randint(2, VOCAB, (6, 80), generator=generator).tolist()
    lengths = [3, 16, 17, 50, 80, 33]
    return [
        request(str(i), prompt[:length], image if i % 2 else None)
        for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True))
    ]


def outcomes(config: EngineConfig, adapter: Path) -> dict[str, Outcome]:
    harness = Harness(config)
    try:
        return harness.run(requests(harness, adapter))
    finally:
        harness.close()


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2"])
def test_every_backend_gives_the_same_text(family: str, tmp_path: Path) -> None:
    """Whole, sliding and mixed windows, softcap; prompts in chunks of 24 beside decode tokens."""
    model = make_model(family, tmp_path / "base")
    make_adapter(model, tmp_path / "adapter", seed=3)
    config = config_of(tmp_path / "base", max_batch_prefill_tokens=24)
    expected = outcomes(config, tmp_path / "adapter")
    for name in PACKAGES:
        found = outcomes(with_backend(config, name), tmp_path / "adapter")
        for id, outcome in expected.items():
            assert found[id].tokens == outcome.tokens
            near = torch.tensor(found[id].logprobs) - torch.tensor(outcome.logprobs)
            assert near.abs().max() < 1e-4


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize("ahead", [0, 1], ids=["in turn", "run ahead"])
@pytest.mark.parametrize("name", PACKAGES)
def test_captured_steps_give_what_the_builtin_ones_give(
    name: str, ahead: int, tmp_path: Path
) -> None:
    """Steps that only decode are padded to a graph's shape and planned ahead of it; none with chunks is captured."""
    scene = make_scene(tmp_path)
    options = {"block_size": 256, "max_batch_total_tokens": 20 * 256}
    config = small_config(scene, max_batch_prefill_tokens=64, **options)
    twins = Twins(scene, with_backend(config, name), config)
    graphs = twins.capture()
    twins.run(40, seed=ahead, longest=60, ahead=ahead)
    assert not any(shape.chunks for shape, _ in graphs.replayed)
    assert len({shape for shape, _ in graphs.replayed}) > 2
    assert any(plan.chunks for plan in twins.plans)
    twins.close()


@pytest.mark.usefixtures("stand_ins")
@pytest.mark.parametrize(
    ("name", "block_size", "serves"),
    [
        ("auto", 16, None),
        ("builtin", 16, None),
        ("flashinfer", 16, "flashinfer fake"),
        ("flash-attn", 256, "flash-attn fake"),
    ],
)
def test_info_names_the_backend_and_its_block(
    name: str, block_size: int, serves: str | None, tmp_path: Path
) -> None:
    make_model("llama", tmp_path)
    harness = Harness(with_backend(config_of(tmp_path), name))
    info, cache = harness.engine.info, harness.engine.runner.builder.cache
    harness.close()
    assert info.block_size == cache.shape[3] == block_size
    assert info.backends["paged_attention"] in ([serves] if serves else ["extension", "reference"])


def test_a_backend_that_is_not_for_this_machine_ends_the_start(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    make_model("llama", tmp_path)
    with pytest.raises(ConfigError, match="--attention-backend flashinfer: "):
        Harness(with_backend(config_of(tmp_path), "flashinfer"))


def test_the_memory_plan_follows_the_backend(tmp_path: Path) -> None:
    """Its block size, its workspace, and a block size that it cannot read."""
    make_model("llama", tmp_path)
    config, spec = config_of(tmp_path), spec_from(tmp_path)
    platform = Platform(torch.device("cuda"), "a GPU", 4 << 30)
    needs = Needs(4, 2, 16, 0.25, 0.0, frozenset({0}), torch.bfloat16, torch.device("cpu"), HOPPER)
    builtin = Builtin()
    flashinfer = FlashInfer(needs, fake_attention.flashinfer)
    flash = FlashAttention(needs, fake_attention.flash_attn)

    def plan(backend: AttentionBackend, block_size: int | None = None) -> tuple[int, int, int]:
        given = replace(config, scheduler=replace(config.scheduler, block_size=block_size))
        made = plan_memory(given, platform, spec, FOOTPRINT, backend)
        return made.block_size, made.kv_block, made.working

    block_size, kv_block, working = plan(builtin)
    assert plan(flash) == (256, kv_block * 256 // block_size, working)
    assert plan(flashinfer) == (block_size, kv_block, working + flashinfer.workspace(256))
    assert plan(builtin, 32)[0] == plan(flashinfer, 32)[0] == 32
    assert plan(flash, 512)[0] == 512
    with pytest.raises(ConfigError, match="--block-size 128 is not a multiple of 256") as caught:
        plan(flash, 128)
    assert caught.value.field == "block_size"


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("most", [None, 65536])
def test_the_lines_of_the_memory_plan_are_the_budget(
    device: str, most: int | None, tmp_path: Path
) -> None:
    """To the byte; on a CPU the weights are beside it. Less than a block is unused, unless no more can be used."""
    make_model("llama", tmp_path)
    config, spec = config_of(tmp_path), spec_from(tmp_path)
    scheduler = replace(config.scheduler, max_batch_total_tokens=most, max_batch_size=50_000)
    platform = Platform(torch.device(device), "a device", 4 << 30)
    plan = plan_memory(replace(config, scheduler=scheduler), platform, spec, FOOTPRINT, Builtin())
    *parts, (tier, _), (unused, left) = plan.lines
    assert tier.startswith("adapters in host memory") and "4.000" in unused
    beside = plan.weights if device == "cpu" else 0
    assert sum(num_bytes for _, num_bytes in parts) + left == platform.budget + beside
    assert (0 <= left < plan.kv_block) == (most is None)


@pytest.mark.parametrize("vocab", [1000, 32_000, 256_000])
def test_the_memory_plan_has_room_for_scored_prompts(vocab: int, tmp_path: Path) -> None:
    """As many tokens as it lets a step score, or as a step has."""
    make_model("llama", tmp_path)
    config, spec = config_of(tmp_path), replace(spec_from(tmp_path), vocab=vocab)
    platform = Platform(torch.device("cuda"), "a GPU", 8 << 30)

    def plan(tokens: int) -> MemoryPlan:
        scheduler = replace(config.scheduler, max_batch_prefill_tokens=tokens)
        return plan_memory(
            replace(config, scheduler=scheduler), platform, spec, FOOTPRINT, Builtin()
        )

    each = vocab * (2 + 3 * 4)  # bytes: in 16 bits, in 32, and two more of them
    large, small = plan(2048), plan(256)
    for made in (large, small):
        assert made.max_scored_tokens == min(SCORED_BYTES // each, made.max_step_tokens) > 0
    scored = large.max_scored_tokens - small.max_scored_tokens
    assert large.working - small.working >= scored * each
    assert (scored == 0) == (vocab == 256_000)


@pytest.fixture
def half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineConfig:
    """A bfloat16 model with heads of 128, which every package serves, and an adapter beside it."""
    monkeypatch.setitem(CONFIGS, "wide", lambda: LlamaConfig(**SMALL, head_dim=128))
    model = make_model("wide", tmp_path / "base")
    make_adapter(model, tmp_path / "adapter", seed=3)
    given = ModelConfig(model_id=str(tmp_path / "base"), dtype="bfloat16")
    return replace(config_of(tmp_path / "base", max_batch_prefill_tokens=24), model=given)


TIE = 0.25  # of log-probabilities: a few roundings of logits whose size is about 8


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # the packages' own
@pytest.mark.parametrize("eager", [True, False])
@pytest.mark.parametrize("name", PACKAGES)
def test_packages_differ_by_ties_only(
    name: str, eager: bool, half: EngineConfig, tmp_path: Path
) -> None:
    """On a GPU, captured and not: equal tokens and near log-probabilities, up to a choice between equals."""
    pytest.importorskip(PACKAGES[name])
    config = replace(half, memory=replace(half.memory, eager=eager))
    expected = outcomes(config, tmp_path / "adapter")
    found = outcomes(with_backend(config, name), tmp_path / "adapter")
    for id, outcome in expected.items():
        assert len(found[id].outputs) == len(outcome.outputs)
        for ours, theirs in zip(outcome.outputs, found[id].outputs, strict=True):
            assert ours.logprob is not None and theirs.logprob is not None
            assert abs(ours.logprob - theirs.logprob) < TIE
            if ours.token != theirs.token:
                break
