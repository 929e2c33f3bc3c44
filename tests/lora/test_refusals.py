"""What cannot be served exactly is refused with the module, the field and the remedy; nothing is dropped silently."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file

from engine import sandbox
from engine.errors import AdapterIncompatible, AdapterLoadFailed, AdapterTooLarge
from engine.lora.formats import check_peft
from engine.lora.image import image_size, write_image
from engine.lora.peft_fields import FIELDS
from engine.lora.weights import LoraWeights, Pair, TargetIndex, TensorMatrix
from engine.ops.layout import ShardLayout
from engine.ops.targets import Group, ModelTargets, Target
from tests.lora import tiny

Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound adapter of rank 4 on q_proj and up_proj."""
    adapted = tiny.adapt(tiny.llama(), r=4, target_modules=["q_proj", "up_proj"])
    return tiny.save(adapted, tmp_path_factory.mktemp("plain"))


def changed(
    plain: Path,
    folder: Path,
    fields: dict[str, Any] | None = None,
    tensors: Callable[[dict[str, torch.Tensor]], Any] = lambda tensors: None,
) -> Path:
    """A copy of an adapter with other fields and other tensors."""
    folder.mkdir(exist_ok=True)
    config = json.loads((plain / "adapter_config.json").read_text()) | (fields or {})
    (folder / "adapter_config.json").write_text(json.dumps(config))
    loaded = load_file(plain / "adapter_model.safetensors")
    tensors(loaded)
    save_file(loaded, folder / "adapter_model.safetensors")
    return folder


def refused(folder: Path, **given: Any) -> AdapterIncompatible:
    layout = tiny.llama_layout()
    with (
        pytest.raises(AdapterIncompatible) as caught,
        tiny.load(folder, layout, **given) as weights,
    ):
        write_image(weights, layout, memoryview(bytearray(image_size(weights, layout).total)))
    assert not tiny.inspect(folder, layout, **given).ok
    return caught.value


def test_a_sound_adapter_is_taken(plain: Path) -> None:
    with tiny.load(plain, tiny.llama_layout()) as weights:
        assert len(weights.pairs) == 2 * tiny.LAYERS and not weights.notes


def test_every_field_of_peft_has_its_place() -> None:
    assert {field.name for field in dataclasses.fields(LoraConfig)} <= set(FIELDS)
    for name, field in FIELDS.items():
        assert field.what and bool(field.remedy) == (field.kind == "refused"), name


def test_peft_writes_nothing_else(plain: Path) -> None:
    """Every field that a default configuration writes is in the table, and none is refused."""
    assert set(json.loads((plain / "adapter_config.json").read_text())) <= set(FIELDS)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("use_dora", True),
        ("bias", "some"),
        ("lora_bias", True),
        ("modules_to_save", ["lm_head"]),
        ("target_parameters", ["mlp.experts.gate_up_proj"]),
        ("alora_invocation_tokens", [1, 2]),
        ("trainable_token_indices", [5]),
        ("trainable_token_indices", {"embed_tokens": [5]}),
        ("layer_replication", [[0, 4], [2, 5]]),
        ("ensure_weight_tying", True),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1e-4}),
        ("megatron_config", {"a": 1}),
        ("some_future_field", {"x": 1}),
        ("peft_type", "ADALORA"),
        ("peft_type", "IA3"),
        ("peft_type", None),
        *(
            ("init_lora_weights", init)
            for init in ("pissa", "pissa_niter_16", "olora", "corda", "loftq", "lora_ga", "new")
        ),
        ("r", 0),
        ("r", "8"),
        ("r", 4.5),
        ("r", True),
        ("lora_alpha", None),
        ("lora_alpha", float("nan")),
        ("lora_alpha", 10**400),
        ("rank_pattern", {"(?=a)": 4}),
        ("rank_pattern", {"(a{1000}){1000}": 4}),
        ("rank_pattern", {"(": 4}),
        ("rank_pattern", {"q_proj": -1}),
        ("rank_pattern", [1]),
        ("alpha_pattern", {"q_proj": "4"}),
        ("alpha_pattern", {r"(a)\1": 4}),
    ],
)
def test_a_field_that_cannot_be_honoured(
    field: str, value: Any, plain: Path, tmp_path: Path
) -> None:
    error = refused(changed(plain, tmp_path, {field: value}))
    assert error.field == field and field in error.message


@pytest.mark.parametrize(
    "field", ["train_seed", "axolotl_version", "Training_Date", "unsloth_fixed"]
)
def test_an_unknown_field_about_the_training_is_a_note(
    field: str, plain: Path, tmp_path: Path
) -> None:
    report = tiny.inspect(changed(plain, tmp_path, {field: 3}), tiny.llama_layout())
    assert report.ok and any(f"unknown field {field} is ignored" in note for note in report.notes)


@pytest.mark.parametrize("field", ["lora_scale", "constrain", "updates", "seeded", "trainable_x"])
@pytest.mark.parametrize("value", [2, 0.5, True, "x", [1], {"a": 1}])
def test_an_unknown_field_that_may_change_the_output(
    field: str, value: Any, plain: Path, tmp_path: Path
) -> None:
    (error,) = tiny.inspect(changed(plain, tmp_path, {field: value}), tiny.llama_layout()).errors
    assert error.field == field and "unknown field" in error.message


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_16", "olora", "corda", "lora_ga", "loftq"])
def test_inits_that_change_the_base_name_the_remedy(init: str, plain: Path, tmp_path: Path) -> None:
    error = refused(changed(plain, tmp_path, {"init_lora_weights": init}))
    remedy = (
        "merge_and_unload"
        if init == "loftq"
        else "path_initial_model_for_weight_conversion=INITIAL"
    )
    assert "changes the base weights" in error.message and remedy in (error.hint or "")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("init_lora_weights", "gaussian"),
        ("init_lora_weights", "eva"),
        ("init_lora_weights", "orthogonal"),
        ("init_lora_weights", "MiCA"),
        ("init_lora_weights", False),
        ("lora_dropout", 0.5),
        ("loftq_config", {"loftq_bits": 4}),
        ("eva_config", {"rho": 2.0}),
        ("velora_config", {"num_groups": 64}),
        ("modules_to_save", []),
        ("merge_weights", True),
        ("enable_lora", None),
        ("some_future_field", None),
        ("some_future_field", False),
        ("target_modules", "all-linear"),
        ("peft_type", "lora"),
    ],
)
def test_a_field_without_effect_is_taken(
    field: str, value: Any, plain: Path, tmp_path: Path
) -> None:
    with tiny.load(changed(plain, tmp_path, {field: value}), tiny.llama_layout()):
        pass


def put(name: str, *shape: int, dtype: torch.dtype = torch.float32) -> Callable[[Any], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape, dtype=dtype)})


E = "base_model.model.model.layers.0.block_sparse_moe.experts.3.w1.lora_{}.weight"
TENSORS: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "half missing": (lambda t: t.pop(Q.format(1, "B")), "layers.1.self_attn.q_proj", "not B"),
    "no such layer": (put(Q.format(9, "A"), 4, 24), "layers.9", "not in the served"),
    "expert": (put(E.format("A"), 4, 24), "experts.3", "expert of a mixture"),
    "unknown linear": (put(Q.format(0, "A").replace("q_proj", "router"), 4, 24), "router", "not a LoRA target"),
    "other inputs": (put(Q.format(0, "A"), 4, 32), "q_proj", "trained on another base model"),
    "other outputs": (put(Q.format(0, "B"), 32, 4), "q_proj", "trained on another base model"),
    "rank differs": (put(Q.format(0, "B"), 24, 5), "q_proj", "not those of a LoRA pair"),
    "empty": (put(Q.format(0, "A"), 0, 24), "q_proj", "was saved empty"),
    "flat": (put(Q.format(0, "A"), 96), "q_proj", "not those of a LoRA pair"),
    "dtype": (put(Q.format(0, "A"), 4, 24, dtype=torch.float8_e4m3fn), "q_proj", "F8_E4M3"),
    "dora": (put(Q.format(0, "magnitude_vector"), 24), "use_dora", "DoRA"),
    "bias of B": (put(Q.format(0, "B").replace("weight", "bias"), 24), "lora_bias", "bias"),
    "bias": (put("base_model.model.model.layers.0.self_attn.q_proj.bias", 24), "bias", "bias"),
    "head": (put("base_model.model.lm_head.weight", 50, 23), "modules_to_save", "not [50, 24]"),
    "large head": (put("base_model.model.lm_head.weight", 307, 24), "max_added_tokens", "the limit is 256"),
    "added alone": (put("base_model.model.lm_head.weight", 52, 24), "modules_to_save", "embed_tokens has 50 tokens"),
    "head of bytes": (put("base_model.model.lm_head.weight", 50, 24, dtype=torch.uint8), "lm_head", "dtype U8"),
    "head twice": (
        lambda t: put("lm_head.weight", 50, 24)(t) or put("lm_head.base_layer.weight", 50, 24)(t), "lm_head", "twice",
    ),
    "saved": (put("base_model.model.score.modules_to_save.weight", 2, 24), "modules_to_save", "classification"),
    "tokens": (
        put("base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta", 1, 24),
        "trainable_token_indices",
        "not a list of different tokens",
    ),
    "anything": (put("something", 3), "something", "not a LoRA tensor"),
    "embedding half": (put("base_model.model.model.embed_tokens.lora_embedding_A", 4, 50), "embed", "B"),
    "wrong kind": (put(Q.format(0, "A").replace("lora_A.weight", "lora_embedding_A"), 4, 24), "q_", "both"),
    "twice": (put(Q.format(0, "A").removeprefix("base_model.model."), 4, 24), "q_proj", "the same tensor"),
    "nothing": (lambda t: t.clear() or put("velora.lora_velora_embed", 1)(t), "", "no LoRA tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(case: str, plain: Path, tmp_path: Path) -> None:
    change, field, words = TENSORS[case]
    error = refused(changed(plain, tmp_path, None, change))
    assert field in (error.field or "") and words in error.message and error.hint


REAL: dict[str, tuple[dict[str, Any], set[str]]] = {
    "pissa": ({"init_lora_weights": "pissa"}, {"init_lora_weights"}),
    "olora": ({"init_lora_weights": "olora"}, {"init_lora_weights"}),
    "invocation": ({"alora_invocation_tokens": [1]}, {"alora_invocation_tokens"}),
}


@pytest.mark.parametrize("case", REAL)
def test_what_peft_really_saves(case: str, tmp_path: Path) -> None:
    """Never for another reason."""
    fields, names = REAL[case]
    given = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | fields
    folder = tiny.save(tiny.adapt(tiny.llama(), **given), tmp_path)
    assert {error.field for error in tiny.inspect(folder, tiny.llama_layout()).errors} == names


INDICES = [
    [1, 1],
    [-1, 2],
    [1, 50],
    ["1", 2],
    [True, 2],
    {"lm_head": [1, 2]},
    {"embed_tokens": 1},
    [1],
    7,
]


@pytest.mark.parametrize("value", INDICES)
def test_trained_tokens_agree_with_the_configuration(value: Any, tmp_path: Path) -> None:
    fields = {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}
    folder = tiny.save(tiny.adapt(tiny.llama(), **fields), tmp_path / "a")
    with tiny.load(folder, tiny.llama_layout()) as weights:
        assert [own.ids.tolist() for own in weights.own.values()] == [[1, 2]]
    error = refused(changed(folder, tmp_path / "b", {"trainable_token_indices": value}))
    assert error.field == "trainable_token_indices" and error.hint


def test_dora_and_own_rows_of_one_module(tmp_path: Path) -> None:
    """The norm would be that of the own rows."""
    fields = {"r": 2, "target_modules": ["q_proj", "lm_head"], "use_dora": True}
    folder = tiny.save(
        tiny.adapt(tiny.llama(), **fields), tmp_path / "a", save_embedding_layers=True
    )
    assert "rows of its own and DoRA" in refused(folder).message


EXTRAS: dict[str, tuple[dict[str, Any], str]] = {
    "use_dora": ({"use_dora": True}, "magnitude_vector"),
    "lora_bias": ({"lora_bias": True}, "lora_B.bias"),
}


@pytest.mark.parametrize("field", EXTRAS)
def test_extras_agree_with_the_configuration(field: str, tmp_path: Path) -> None:
    """Tensors that the configuration does not announce, which PEFT would ignore, or that it announces in vain."""
    given, part = EXTRAS[field]
    fields = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"} | given
    folder = tiny.save(tiny.adapt(tiny.llama(), **fields), tmp_path / "a")
    with tiny.load(folder, tiny.llama_layout()) as weights:
        assert len(weights.extras) == tiny.LAYERS
    error = refused(changed(folder, tmp_path / "b", {field: False}))
    assert error.field == field and f"does not set {field}" in error.message

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        tensors.pop(next(key for key in tensors if part in key))

    error = refused(changed(folder, tmp_path / "c", None, drop))
    assert error.field == field and "lacks" in error.message


MISFITS: dict[str, tuple[dict[str, Any], Callable[[Any], Any], str]] = {
    "no pair": ({"use_dora": True}, put(Q.format(0, "magnitude_vector").replace("q_", "k_"), 12), "no lora_A"),
    "size": ({"use_dora": True}, put(Q.format(0, "magnitude_vector"), 25), "has the shape [25], not [24]"),
    "dtype": ({"lora_bias": True}, put(Q.format(0, "B").replace("weight", "bias"), 24, dtype=torch.int8), "dtype I8"),
    "no bias": ({"bias": "all"}, put("base_model.model.model.layers.0.self_attn.k_proj.bias", 12), "no bias there"),
    "norm": ({"bias": "all"}, put("base_model.model.model.layers.0.input_layernorm.bias", 24), "outside of the linear"),
    "table": (
        {"lora_bias": True},
        put("base_model.model.model.embed_tokens.lora_B.bias", 24),
        "bias of lora_B of an embedding",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", MISFITS)
def test_extras_that_do_not_fit(case: str, plain: Path, tmp_path: Path) -> None:
    fields, change, words = MISFITS[case]
    errors = tiny.inspect(changed(plain, tmp_path, fields, change), tiny.llama_layout()).errors
    assert any(words in error.message and error.hint for error in errors)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_extras_that_are_not_finite(value: float, tmp_path: Path) -> None:
    adapted = tiny.adapt(tiny.llama(), r=2, target_modules=["q_proj"], lora_bias=True)
    folder = tiny.save(adapted, tmp_path / "a")

    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[next(key for key in tensors if key.endswith("lora_B.bias"))][3] = value

    assert "not finite" in refused(changed(folder, tmp_path / "b", None, spoil)).message


def test_another_base_model_is_told_once_per_linear(tmp_path: Path) -> None:
    adapted = tiny.adapt(tiny.llama(hidden=32), r=2, target_modules=["q_proj", "o_proj"])
    folder = tiny.save(adapted, tmp_path)
    found, problems = check_peft(*tiny.files(folder), tiny.llama_layout().targets)
    assert found is None and len(problems) == 2
    assert all("trained on another base model" in error.message for error in problems)
    assert "and 2 more like it" in problems[0].message and "maps 32 to 32" in problems[0].message


def test_all_problems_are_reported(plain: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        put("something", 3)(tensors)
        tensors.pop(Q.format(1, "B"))

    report = tiny.inspect(changed(plain, tmp_path, {"use_dora": True}, change), tiny.llama_layout())
    assert [error.field for error in report.errors] == [
        "something",
        "model.layers.1.self_attn.q_proj",
        "use_dora",
    ]


def test_rank_beyond_the_limit(plain: Path) -> None:
    assert "--max-adapter-rank 4" in (refused(plain, max_rank=3).hint or "")


def test_rank_that_the_configuration_does_not_say(plain: Path, tmp_path: Path) -> None:
    """alpha / r would be of the wrong r."""
    error = refused(changed(plain, tmp_path, {"r": 8}))
    assert "has rank 4, but adapter_config.json says 8" in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("half", ["A", "B"])
def test_values_that_are_not_finite(value: float, half: str, plain: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q.format(2, half)][1, 1] = value

    error = refused(changed(plain, tmp_path, None, change))
    assert error.field == "model.layers.2.self_attn.q_proj"


def test_values_beyond_the_dtype(plain: Path, tmp_path: Path) -> None:
    """1e6 is finite in the file and infinite in float16."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[Q.format(2, "A")][1, 1] = 1e6

    folder, layout = changed(plain, tmp_path, None, change), tiny.llama_layout("float16")
    assert tiny.inspect(folder, tiny.llama_layout()).ok
    assert "not finite in float16" in tiny.inspect(folder, layout).errors[0].message


def test_another_name_of_the_base_is_a_note(plain: Path, tmp_path: Path) -> None:
    folder = changed(plain, tmp_path, {"base_model_name_or_path": "org/other"})
    report = tiny.inspect(folder, tiny.llama_layout(), base_model="org/served")
    assert report.ok and report.base_matches is False and "org/other" in report.notes[0]
    assert report.targets == {"q_proj": 3, "up_proj": 3} and report.ranks == [4]
    assert report.digest and report.data_bytes > 0


def header(entries: dict[str, Any]) -> bytes:
    """A safetensors file of this header, with 16 bytes of data."""
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text)) + text + bytes(16)


def test_unfit_files(plain: Path, tmp_path: Path) -> None:
    """Damaged headers, truncated data, code in a .bin, no JSON: typed errors, never a crash."""
    layout = tiny.llama_layout()
    config, good = tiny.paths(plain)
    weights = tmp_path / "adapter_model.safetensors"
    whole = good.read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    bad_header = whole.replace(b'"data_offsets":[0,', b'"data_offsets":[9,')
    for data in (struct.pack("<Q", 1 << 60), bad_header,
                 struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 9) + b'{"a": [1]}',
                 header({"\ud800": {"dtype": "F32", "shape": [1, 4], "data_offsets": [0, 16]}}),
                 header({"a": {"dtype": "F32", "shape": [1e999, 4], "data_offsets": [0, 16]}})):  # fmt: skip
        weights.write_bytes(data)
        with pytest.raises(AdapterIncompatible) as caught:
            tiny.loaded(config, weights, layout)
        msgspec.msgpack.encode(caught.value.to_wire())
    for size in (0, 3, 100, 8 + length, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(AdapterLoadFailed, match="incomplete") as failed:
            tiny.loaded(config, weights, layout)
        assert "wait until" in (failed.value.hint or "")
    with pytest.raises(AdapterLoadFailed):
        tiny.loaded(config, tmp_path / "none.safetensors", layout)
    with pytest.raises(AdapterLoadFailed):
        tiny.loaded(tmp_path / "none.json", good, layout)
    (tmp_path / "adapter_config.json").write_text("{,")
    with pytest.raises(AdapterIncompatible):
        tiny.loaded(tmp_path / "adapter_config.json", good, layout)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "\\ud800"}')
    with pytest.raises(AdapterIncompatible):
        tiny.loaded(tmp_path / "adapter_config.json", good, layout)
    for content in (
        {"a": os.system},
        [torch.ones(1)],
        {"a": "text"},
        {"a": torch.eye(3).to_sparse()},
        {"a": torch.ones(2, 2, device="meta")},
    ):
        torch.save(content, tmp_path / "adapter_model.bin")
        with pytest.raises(AdapterIncompatible, match=r"adapter_model\.bin"):
            tiny.loaded(config, tmp_path / "adapter_model.bin", layout)
    torch.save({"a": torch.ones(100)}, tmp_path / "adapter_model.bin")
    truncated = (tmp_path / "adapter_model.bin").read_bytes()[:200]
    for data, error in (
        (b"nonsense", AdapterIncompatible),
        (b"", AdapterLoadFailed),
        (truncated, AdapterLoadFailed),
    ):
        (tmp_path / "adapter_model.bin").write_bytes(data)
        with pytest.raises(error):
            tiny.loaded(config, tmp_path / "adapter_model.bin", layout)


def test_a_bin_that_changes_while_it_is_read(
    plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it can be read nevertheless or not."""
    config = tiny.paths(plain)[0]
    file = tmp_path / "adapter_model.bin"
    for damages in (False, True):
        torch.save({"a": torch.ones(3) * damages}, file)

        def spoilt(*given: Any, damages: bool = damages) -> Any:
            os.utime(file, (1, 1))
            if damages:
                os.truncate(file, 300)
            return sandbox.run(*given)

        monkeypatch.setattr("engine.sandbox.convert.run", spoilt)
        with pytest.raises(AdapterLoadFailed, match="changed"):
            tiny.loaded(config, file, tiny.llama_layout())


def test_a_file_that_changes_while_it_is_read(plain: Path, tmp_path: Path) -> None:
    """A trainer that writes over its file is an error, not the end of the process."""
    layout = tiny.llama_layout()
    for spoil in (lambda path: os.truncate(path, 3000), lambda path: os.utime(path, (1, 1))):
        folder = changed(plain, tmp_path)
        with tiny.load(folder, layout) as weights:
            spoil(folder / "adapter_model.safetensors")
            with pytest.raises(AdapterLoadFailed):
                write_image(
                    weights, layout, memoryview(bytearray(image_size(weights, layout).total))
                )


def test_what_records_cannot_address() -> None:
    layout = ShardLayout(
        ModelTargets(1, (Group("g", 1 << 34, (Target("t", "t", 4),)),), ()), "float32"
    )
    pair = Pair(TensorMatrix(torch.ones(1, 1)), TensorMatrix(torch.ones(4, 1)), 1.0, "t")
    with pytest.raises(AdapterTooLarge):
        image_size(LoraWeights({TargetIndex(0, 0, 0): pair}), layout)
