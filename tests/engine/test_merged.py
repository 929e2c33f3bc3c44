"""--merge-adapter-weights: the engine computes what PEFT's model computes, merged or not."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from engine.config import EngineConfig
from engine.errors import (
    AdapterForbidden,
    AdapterIncompatible,
    AdapterNotFound,
    ConfigError,
    LoraxError,
)
from engine.layers.quantised import SCHEMES
from engine.lora import fold
from engine.platform import host_tier_bytes
from tests.engine.harness import Harness, Outcome, config_of, request
from tests.engine.test_adapter_formats import (
    ENDS,
    NEW,
    PROMPT,
    ROWS,
    Row,
    adapt,
    assert_like,
    resized,
)
from tests.tiny import VOCAB, make_adapter, make_model

Base = tuple[Path, PreTrainedModel]
Bases = Callable[[str], Base]

MORE = {
    "rslora with patterns": Row(
        "llama",
        dict(
            r=4, lora_alpha=6, use_rslora=True, target_modules="all-linear",
            rank_pattern={r".*\.1\..*": 2, "up_proj": 6}, alpha_pattern={"q_proj": 5},
        ),
    ),
    "head of a tied base": Row("gemma2", dict(r=4, lora_alpha=6, target_modules=["q_proj", "lm_head"])),
    "both ends of a tied base": Row("gemma2", dict(r=4, lora_alpha=6, target_modules=ENDS)),
    "dora of a tied head": Row("gemma2", dict(r=4, use_dora=True, target_modules=["lm_head", "up_proj"])),
    "lora_bias of some": Row("qwen2", dict(r=4, lora_alpha=6, lora_bias=True, target_modules=["v_proj", "gate_proj"])),
    "lora_bias on all biases": Row(
        "llama-yarn-bias", dict(r=4, lora_alpha=6, lora_bias=True, target_modules=["q_proj", "o_proj", "down_proj"])
    ),
}  # fmt: skip
MERGED = {name: row for name, row in (ROWS | MORE).items() if row.vocab == VOCAB}
REFUSED = {name: row for name, row in ROWS.items() if row.vocab != VOCAB}
# The head has no bias in the base.
REFUSED["lora_bias on biases"] = MERGED.pop("lora_bias on biases")
# PEFT merges no lora_bias into a linear without a bias, and merges into a tied matrix for both of its uses.
NOT_BY_PEFT = {
    "lora_bias",
    "lora_bias of some",
    "conv1d",
    "tied and scaled embedding",
    "head of a tied base",
    "both ends of a tied base",
    "dora of a tied head",
}


def merging(
    base: Path, adapter: Path | str, root: Path | None = None, **model: Any
) -> EngineConfig:
    """The configuration of a small engine that merges an adapter. `model`: fields of ModelConfig."""
    config = config_of(base)
    adapters = replace(
        config.adapters,
        adapter_id=str(adapter),
        adapter_source="local",
        adapter_root=(str(root or Path(adapter).parent),),
        merge_adapter_weights=True,
    )
    return replace(config, model=replace(config.model, **model), adapters=adapters)


@contextmanager
def engine_of(config: EngineConfig) -> Iterator[Harness]:
    harness = Harness(config)
    try:
        yield harness
    finally:
        harness.close()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Bases:
    made: dict[str, Base] = {}

    def base(family: str) -> Base:
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            made[family] = folder, make_model(family, folder)
        return made[family]

    return base


def held(harness: Harness) -> dict[str, Tensor]:
    """The weights that the engine multiplies with, by their names in the checkpoint."""
    decoder, found = harness.engine.model, {}
    for linear in decoder.linears.values():
        rows, first = linear.weight_rows(slice(None)).float(), 0
        for target, size in zip(linear.group.targets, linear.splits, strict=True):
            name = f"{target.whole.module.format(layer=linear.layer)}.weight"
            part = rows[first : first + size]
            turned = linear is decoder.embedding or (
                linear is not decoder.head and decoder.spec.names.transposed
            )
            found[name] = (part.T if turned else part).contiguous()
            first += size
    return found


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MERGED)
def test_parity(name: str, bases: Bases, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold, "STRIP_WEIGHTS", 1500)  # a weight takes several strips
    row = MERGED[name]
    folder, model = bases(row.family)
    adapt(row, copy.deepcopy(model), tmp_path)
    with engine_of(merging(folder, tmp_path)) as harness:
        (outcome,) = harness.run([request("", PROMPT, None, NEW, prompt_logprobs=True)]).values()
    adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(tmp_path)).eval()
    assert_same(outcome, adapted)
    if name not in NOT_BY_PEFT:
        assert_same(outcome, adapted.merge_and_unload())


def assert_same(outcome: Outcome, model: torch.nn.Module) -> None:
    """Log-probabilities and greedy text."""
    assert_like(outcome, model, PROMPT)
    with torch.no_grad():
        best = model(torch.tensor([PROMPT + outcome.tokens])).logits[0].argmax(-1)
    assert outcome.tokens == best[len(PROMPT) - 1 : -1].tolist()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_merged_is_refused(name: str, bases: Bases, tmp_path: Path) -> None:
    row = REFUSED[name]
    folder, model = bases(row.family)
    adapt(row, resized(model, row.vocab), tmp_path)
    why = "another vocabulary" if row.vocab != VOCAB else "lm_head has a bias in the adapter"
    with pytest.raises(AdapterIncompatible, match=why) as caught:
        Harness(merging(folder, tmp_path))
    assert caught.value.hint == "serve it without --merge-adapter-weights"


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_one_rounding(family: str, dtype: str, bases: Bases, tmp_path: Path) -> None:
    """Every weight is the number of the dtype that is nearest to W + s B A; where no adapter is, to W."""
    folder, model = bases(family)
    wrapped = make_adapter(model, tmp_path, 0, targets="ends")
    exact = {}
    for path, module in model.named_modules():
        name = f"{path.removesuffix('.base_layer')}.weight"
        if isinstance(module, BaseTunerLayer):
            delta = module.get_delta_weight("default").double()
            exact[f"{path}.weight"] = module.get_base_layer().weight.double() + delta
        elif name not in exact and getattr(module, "weight", None) is not None:
            exact[name] = module.weight.double()
    wrapped.unload()
    with engine_of(merging(folder, tmp_path, dtype=dtype)) as harness:
        found = held(harness)
    assert len(found) == 3 * (4 if family == "gpt2" else 7) + 2
    for name, weight in found.items():
        wanted = exact[name]
        _, exponent = wanted.abs().clamp(min=2**-14).frexp()
        half = torch.finfo(getattr(torch, dtype)).eps * 2.0 ** (exponent - 2)
        assert ((weight.double() - wanted).abs() <= half * 1.001).all(), name


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merged_weight_is_quantised(scheme: str, bases: Bases, tmp_path: Path) -> None:
    """The same weights and text as those of the merged checkpoint, quantised."""
    folder, model = bases("qwen2")
    row = Row("qwen2", dict(r=4, use_dora=True, target_modules=["q_proj", "down_proj", "lm_head"]))
    with warnings.catch_warnings(action="ignore"):
        adapt(row, copy.deepcopy(model), tmp_path / "adapter")
    with engine_of(merging(folder, tmp_path / "adapter")) as harness:
        state = {**model.state_dict(), **held(harness)}
    model.save_pretrained(tmp_path / "merged", state_dict=state)
    plain = config_of(tmp_path / "merged")
    runs = []
    for config in (
        merging(folder, tmp_path / "adapter", quantize=scheme),
        replace(plain, model=replace(plain.model, quantize=scheme)),
    ):
        with engine_of(config) as harness:
            (outcome,) = harness.run([request("", PROMPT, None, NEW)]).values()
            runs.append((outcome.outputs, held(harness)))
    (one, of_one), (two, of_two) = runs
    assert one == two
    assert all(torch.equal(of_one[name], of_two[name]) for name in of_two)
    assert not torch.equal(of_one["lm_head.weight"], model.state_dict()["lm_head.weight"])


def test_other_checkpoints_and_files(bases: Bases, tmp_path: Path) -> None:
    """A checkpoint of the bare model, whose names lack the first part, and an adapter saved with torch.save."""
    folder, model = bases("gpt2")
    make_adapter(model, tmp_path / "adapter", 0).unload()
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    tensors = load_file(folder / "model.safetensors")
    short = {name.removeprefix("transformer."): one for name, one in tensors.items()}
    save_file(short, bare / "model.safetensors")
    as_bin = tmp_path / "as_bin"
    shutil.copytree(tmp_path / "adapter", as_bin)
    torch.save(load_file(as_bin / "adapter_model.safetensors"), as_bin / "adapter_model.bin")
    (as_bin / "adapter_model.safetensors").unlink()
    cache = str(tmp_path / "cache")
    runs = []
    for config in (
        merging(folder, tmp_path / "adapter"),
        merging(bare, as_bin, huggingface_hub_cache=cache),
    ):
        with engine_of(config) as harness:
            runs.append(harness.run([request("", PROMPT, None, NEW)])[""].outputs)
    assert runs[0] == runs[1]


def test_the_engine_has_no_room_for_adapters(bases: Bases, tmp_path: Path) -> None:
    """Nor needs it: all memory is for the KV cache, and requests share cached prompts."""
    folder, model = bases("llama")
    make_adapter(model, tmp_path / "a", 0).unload()
    (tmp_path / "a" / "chat_template.jinja").write_text("its own")
    with engine_of(config_of(folder)) as harness:
        before = harness.engine.plan
        (base,) = harness.run([request("", PROMPT, None, NEW)]).values()
    config = merging(folder, "a", tmp_path)
    with engine_of(config) as harness:
        plan, info = harness.engine.plan, harness.engine.info
        first, second = (
            harness.run([request(id, PROMPT * 3, None, NEW)])[id] for id in ("first", "second")
        )
        (alone,) = harness.run([request("", PROMPT, None, NEW)]).values()
    assert plan.arena == 0 and plan.slots == 1
    assert plan.records * before.slots == before.records
    assert (
        plan.unused + plan.num_blocks * plan.kv_block
        > before.unused + before.num_blocks * before.kv_block
    )
    assert host_tier_bytes(config) < 1024
    about = info.merged_adapter
    assert about is not None and (about.name, about.source, about.id) == ("a", "local", "a")
    assert about.revision and about.text is not None and about.text.template == "its own"
    assert second.tokens == first.tokens and second.usage is not None and second.usage.cached_tokens
    assert alone.tokens != base.tokens


@pytest.mark.parametrize(
    ("adapters", "model", "why", "hint"),
    [
        ({"adapter_id": None}, {}, "needs an adapter", "set --adapter-id"),
        ({"preloaded_adapter_ids": ("b",)}, {}, "--preloaded-adapter-ids", "leave one"),
        ({"adapter_alias": ("x=b",)}, {}, "--adapter-alias", "leave one"),
        ({}, {"load_format": "dummy"}, "weights of a checkpoint", "leave --load-format dummy"),
    ],
)
def test_settings_that_contradict_it(
    adapters: Any, model: Any, why: str, hint: str, bases: Bases, tmp_path: Path
) -> None:
    config = merging(bases("llama")[0], "a", tmp_path, **model)
    with pytest.raises(ConfigError, match=why) as caught:
        Harness(replace(config, adapters=replace(config.adapters, **adapters)))
    assert caught.value.field == "merge_adapter_weights"
    assert hint in (caught.value.hint or "")


def test_adapters_that_cannot_be_used(bases: Bases, tmp_path: Path) -> None:
    """As in an exchange: missing, outside of the roots, of another base, diverged."""
    folder, model = bases("llama")
    make_adapter(model, tmp_path / "root" / "good", 0).unload()
    make_adapter(bases("gpt2")[1], tmp_path / "root" / "other", 0).unload()
    shutil.copytree(tmp_path / "root" / "good", tmp_path / "outside")
    file = tmp_path / "root" / "good" / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "layers.1.mlp.down_proj.lora_B" in name)
    for value, kind in ((float("nan"), "nan"), (1e38, "large")):
        bad = tmp_path / "root" / kind
        shutil.copytree(file.parent, bad)
        tensors[name][3, 2] = value
        save_file(tensors, bad / file.name)
    cases: list[tuple[str, type[LoraxError], str]] = [
        ("none", AdapterNotFound, "there is no folder none"),
        ("../outside", AdapterForbidden, "outside every --adapter-root"),
        ("other", AdapterIncompatible, "is not a LoRA target of this model"),
        ("nan", AdapterIncompatible, "model.layers.1.mlp.down_proj has values that are not finite"),
        ("large", AdapterIncompatible, "not finite in float16 when merged"),
    ]
    for adapter, kind_of_error, why in cases:
        with pytest.raises(kind_of_error, match=why):
            Harness(merging(folder, adapter, tmp_path / "root", dtype="float16"))
    with engine_of(merging(folder, "good", tmp_path / "root", dtype="float16")):
        pass
