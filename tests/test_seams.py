"""What is added from this file alone: a source, a linear method, a model family, a request kind, a response format."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp.test_utils import TestClient
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig, PreTrainedModel

from engine.adapters.exchange import Exchange
from engine.adapters.ref import AdapterRef
from engine.adapters.registry import make_sources
from engine.adapters.sources import (
    AdapterFiles,
    Progress,
    Source,
    Version,
    find_weights,
    open_folder,
)
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import InvalidRequest, LoraxError
from engine.kinds import KINDS, RequestKind
from engine.layers.linear import Part
from engine.layers.methods import METHODS
from engine.messages import POOLED, AdapterImageRef, Request, SamplingParams
from engine.models import architectures, spec_from
from engine.models.decoder import Head
from engine.models.spec import ModelSpec, layout_of
from engine.server.decoding import decode
from engine.server.events import Event, FinishedChoice, Token
from engine.server.formats import Answer, Context, Format, GenerationRequest
from engine.server.generation import Generation
from engine.server.parameters import Parameters
from engine.server.routes import FORMATS
from engine.server.text import Text
from tests.engine.harness import Harness, config_of, request
from tests.lora import tiny as tiny_lora
from tests.server import conftest as serving
from tests.server.fake import FakeBackend, Start
from tests.tiny import SMALL, VOCAB, make_adapter, make_model

TOLERANCE = 1e-4
backend, config, folder, start, text = (
    serving.backend,
    serving.config,
    serving.folder,
    serving.start,
    serving.text,
)  # fixtures


def prompt(seed: int, length: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (length,), generator=generator).tolist()


# -- an adapter source


class Shelf(Source):
    """Folders of a shelf: `shelf://folder`, or adapter_source `shelf`."""

    name = "shelf"
    prefix = "shelf://"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        folder = self.folder / ref.id
        return Version(
            self.name, str(folder), "1", find_weights((p.name for p in folder.iterdir()), ref.id)
        )

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        return open_folder(Path(version.id))


async def test_an_adapter_source(tmp_path: Path) -> None:
    make_adapter(make_model("llama", tmp_path / "base"), tmp_path / "a", seed=1)
    layout = layout_of(spec_from(tmp_path / "base"), "float32")
    config = EngineConfig(
        model=ModelConfig(model_id="base", huggingface_hub_cache=str(tmp_path / "cache")),
        adapters=AdapterConfig(adapter_root=(str(tmp_path),)),
    )
    region = HostRegion.create(1 << 20)
    exchange = Exchange(
        config, layout, region, sources={**make_sources(config), Shelf.name: Shelf(tmp_path)}
    )
    expected = tiny_lora.inspect(tmp_path / "a", layout).digest
    for ref in (AdapterRef.parse("shelf://a"), AdapterRef.parse("a", "shelf")):
        with await exchange.acquire(ref) as lease:
            assert (lease.image.digest.hex(), lease.image.source) == (expected, "shelf")
    await exchange.close()
    region.close()


# -- a linear method


class Bytes:
    """int8 codes with a scale for each output, as tensors of its own in the checkpoint."""

    scratch = 0
    codes: Tensor
    scale: Tensor

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    @property
    def size(self) -> int:
        return self.codes.nbytes + self.scale.nbytes

    def parts(self, outputs: int, inputs: int, bias: bool, transposed: bool) -> list[Part]:
        return [Part("codes", (outputs, inputs), 0, 1), Part("scale", (outputs,), 0, None)]

    def allocate(self, rows: int, columns: int, bias: bool) -> None:
        self.codes = torch.zeros(rows, columns, dtype=torch.int8, device=self.device)
        self.scale = torch.zeros(rows, dtype=self.dtype, device=self.device)

    def load(self, part: str, row: int, tensor: Tensor) -> None:
        getattr(self, part)[row : row + tensor.shape[0]].copy_(tensor)

    def matmul(self, x: Tensor) -> Tensor:
        return x @ (self.codes.to(self.dtype) * self.scale[:, None]).T


def store_bytes(folder: Path) -> dict[str, Tensor]:
    """Rewrites a checkpoint's linears as codes and scales; returns the weights that they stand for."""
    stored, meant = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            stored[name] = tensor
            continue
        scale = tensor.abs().amax(1) / 127
        codes = (tensor / scale[:, None]).round().to(torch.int8)
        module = name.removesuffix("weight")
        stored |= {f"{module}codes": codes, f"{module}scale": scale}
        meant[name] = codes.float() * scale[:, None]
    save_file(stored, folder / "model.safetensors")
    return meant


def test_a_linear_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine with codes says what a model with the weights that they stand for says."""
    model = make_model("llama", tmp_path / "base")
    meant = store_bytes(tmp_path / "base")
    model.load_state_dict(meant, strict=False)
    monkeypatch.setitem(METHODS, "bytes", lambda: Bytes)
    config = config_of(tmp_path / "base")
    quantised = replace(config, model=replace(config.model, quantize="bytes"))
    harness = Harness(quantised)
    assert harness.engine.plan.weights < sum(p.nbytes for p in model.parameters()) / 2
    outcome = harness.run([request("a", prompt(0, 30))])["a"]
    assert outcome.tokens == greedy(model, prompt(0, 30))
    harness.close()


def greedy(model: PreTrainedModel, tokens: list[int], count: int = 12) -> list[int]:
    with torch.no_grad():
        made = model.generate(
            torch.tensor([tokens]), max_new_tokens=count, do_sample=False, eos_token_id=None
        )
    return made[0, len(tokens) :].tolist()


# -- a model family


class SmallConfig(LlamaConfig):
    model_type = "small"


def small(config: Any) -> ModelSpec:
    """llama, without the scores' scale being the usual one."""
    spec = architectures.llama(config)
    return replace(spec, attention=replace(spec.attention, scale=0.5))


def test_a_model_family(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    AutoConfig.register("small", SmallConfig, exist_ok=True)
    monkeypatch.setitem(architectures.FAMILIES, "small", small)
    model = make_model("llama", tmp_path / "base")
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.5
    SmallConfig(**SMALL).save_pretrained(tmp_path / "base")
    harness = Harness(config_of(tmp_path / "base"))
    tokens = prompt(1, 40)
    assert harness.engine.info.model_type == "small"
    assert harness.run([request("a", tokens)])["a"].tokens == greedy(model, tokens)
    harness.close()


# -- a request kind

LAST = RequestKind("last", of_last_chunk=POOLED)
MEAN = RequestKind("mean", of_each_chunk=POOLED)
HEADS: dict[str, Head] = {"last": lambda hidden: hidden[-1], "mean": lambda hidden: hidden.sum(0)}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp("seams")
    return folder, make_model("llama", folder / "base")


@pytest.fixture
def pooling(
    base: tuple[Path, PreTrainedModel], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Harness]]:
    """Makes an engine whose model has the two heads."""
    opened: list[Harness] = []
    for kind in (LAST, MEAN):
        monkeypatch.setitem(KINDS, kind.name, kind)

    def make(**scheduler: object) -> Harness:
        harness = Harness(config_of(base[0] / "base", **scheduler))
        harness.engine.model.heads.update(HEADS)
        opened.append(harness)
        return harness

    yield make
    for harness in opened:
        harness.close()


def pooled(
    id: str, kind: str, tokens: list[int], adapter: AdapterImageRef | None = None
) -> Request:
    return Request(id, tokens, SamplingParams(), 0, [], adapter, kind=kind)


def vectors(model: Any, tokens: list[int]) -> dict[str, Tensor]:
    """What the heads make of transformers' hidden states."""
    with torch.no_grad():
        hidden = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[-1][0]
    return {name: head(hidden) for name, head in HEADS.items()}


@pytest.mark.parametrize("step_tokens", [7, 64])
@pytest.mark.parametrize("run_ahead", [0, 1])
def test_request_kinds(
    base: tuple[Path, PreTrainedModel],
    pooling: Callable[..., Harness],
    step_tokens: int,
    run_ahead: int,
) -> None:
    """Vectors and text in one batch, with adapters and without: each is what transformers and PEFT say."""
    path, model = base
    harness = pooling(max_batch_prefill_tokens=step_tokens, max_batch_size=6)
    harness.engine.run_ahead = run_ahead
    requests, expected, texts = [], {}, {}
    for number in range(3):
        wrapped = make_adapter(model, path / f"a{number}", seed=number, rank=4 + number)
        image = harness.stage(path / f"a{number}")
        for length in (1, 20, 45):
            tokens = prompt(number, length)
            for kind, vector in vectors(wrapped, tokens).items():
                id = f"{kind}-{number}-{length}"
                expected[id] = vector
                requests.append(pooled(id, kind, tokens, image))
            id = f"text-{number}-{length}"
            texts[id] = greedy(wrapped, tokens)
            requests.append(request(id, tokens, image))
        wrapped.unload()
    for kind, vector in vectors(model, prompt(9, 45)).items():
        expected[kind] = vector
        requests.append(pooled(kind, kind, prompt(9, 45)))
    found = harness.run(requests)
    for id, vector in expected.items():
        assert found[id].finish == "pooled" and not found[id].outputs
        usage = found[id].usage
        assert usage is not None and usage.generated_tokens == 0
        scale = float(vector.abs().max())
        torch.testing.assert_close(
            torch.tensor(found[id].pooled), vector, atol=TOLERANCE * scale, rtol=0
        )
    for id, text in texts.items():
        assert found[id].tokens == text and found[id].pooled is None


def test_kinds_and_the_prefix_cache(
    base: tuple[Path, PreTrainedModel], pooling: Callable[..., Harness]
) -> None:
    """A head that reads the last token takes a cached prefix, one that reads all tokens does not; equal vectors."""
    harness = pooling(block_size=16)
    tokens = prompt(3, 60)
    expected = vectors(base[1], tokens)
    harness.run([request("first", tokens)])
    for kind, cached in (("last", 48), ("mean", 0)):
        outcome = harness.run([pooled(kind, kind, tokens)])[kind]
        assert outcome.usage is not None and outcome.usage.cached_tokens == cached
        torch.testing.assert_close(
            torch.tensor(outcome.pooled), expected[kind], atol=1e-3, rtol=1e-4
        )


def test_vectors_survive_preemption(
    base: tuple[Path, PreTrainedModel], pooling: Callable[..., Harness]
) -> None:
    """Blocks run out: what was added up so far is dropped with them."""
    harness = pooling(
        block_size=16, max_batch_total_tokens=208, max_batch_prefill_tokens=3, max_batch_size=3
    )
    tokens = prompt(20, 90)
    older = [request(f"text{n}", prompt(n, 4), max_new_tokens=80) for n in range(2)]
    outcome = harness.run([*older, pooled("mean", "mean", tokens)])["mean"]
    assert outcome.usage is not None and outcome.usage.preemptions
    torch.testing.assert_close(
        torch.tensor(outcome.pooled), vectors(base[1], tokens)["mean"], atol=1e-3, rtol=1e-4
    )


def test_kinds_that_are_not_served(
    base: tuple[Path, PreTrainedModel], pooling: Callable[..., Harness]
) -> None:
    harness = pooling()
    with pytest.raises(InvalidRequest, match="prompt") as caught:
        scored = SamplingParams(prompt_logprobs=True)
        harness.engine.submit(Request("a", prompt(0, 5), scored, 0, [], kind="mean"))
    assert caught.value.field == "prompt_logprobs"
    del harness.engine.model.heads["mean"]
    with pytest.raises(InvalidRequest, match="kind 'mean'") as caught:
        harness.engine.submit(pooled("a", "mean", prompt(0, 5)))
    assert caught.value.hint == "this model serves: generate, last"
    with pytest.raises(InvalidRequest, match="kind 'other'"):
        harness.engine.submit(pooled("a", "other", prompt(0, 5)))
    assert not harness.engine.has_work


# -- a response format


class Plainly:
    """The text and nothing else."""

    def __init__(self, generation: Generation, text: Text) -> None:
        self.generation = generation

    def events(self, events: list[Event]) -> bytes:
        return "".join(one.delta for one in events if isinstance(one, Token)).encode()

    def end(self) -> bytes:
        return b"\n"

    def failure(self, error: LoraxError) -> bytes:
        return error.error_type.encode()

    def answer(self, choices: Sequence[FinishedChoice]) -> Answer:
        return Answer([choice.finish.text for choice in choices], {})


def parse(raw: bytes | bytearray, context: Context, /) -> GenerationRequest:
    asked = decode(raw, dict[str, str])
    return GenerationRequest(
        prompts=[asked["say"]],
        parameters=Parameters(adapter=context.adapter(asked.get("as"), None)),
        formatter=Plainly,
        stream="stream" in asked,
    )


async def test_a_response_format(start: Start, backend: FakeBackend) -> None:
    formats = {**FORMATS, "/say": Format(parse, None, lambda error: error.error_type)}
    client: TestClient = await start(formats=formats)
    backend.say("so be it")
    answer = await client.post("/say", json={"say": "x", "as": "me/lora"})
    assert json.loads(await answer.text()) == ["so be it"]
    answer = await client.post("/say", json={"say": "x", "stream": ""})
    assert await answer.text() == "so be it\n"
    answer = await client.post("/say", json={"say": "x", "as": "missing"})
    assert (answer.status, await answer.json()) == (404, "adapter_not_found")
