"""Random adapters: images that read back as written, folders that load like PEFT's."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from engine.adapters.tiers import HostRegion
from engine.bench.adapters import SCALE, Folders, Images, Pool, size_of
from engine.bench.shapes import SHAPES, write_model
from engine.config import ModelConfig
from engine.errors import ConfigError
from engine.lora.image import image_size, read_image, write_image
from engine.lora.weights import LoraWeights, Pair, TensorMatrix
from engine.models import adapter_layout, spec_from
from engine.ops.layout import ShardLayout
from tests.tiny import CONFIGS
from tools.adapters import stage


def layout_of(tmp_path: Path, family: str, dtype: str) -> ShardLayout:
    CONFIGS[family]().save_pretrained(tmp_path / family)
    layout, _, _ = adapter_layout(ModelConfig(model_id=str(tmp_path / family), dtype=dtype))  # type: ignore[arg-type]
    return layout


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize(
    ("family", "targets"),
    [
        ("llama", ()),
        ("gpt2", ()),
        ("llama", ("q_proj", "down_proj")),
        ("llama", ("k_proj", "embed_tokens", "lm_head")),  # rows of odd ranks are filled up
    ],
)
def test_images(tmp_path: Path, family: str, targets: tuple[str, ...], dtype: str) -> None:
    layout = layout_of(tmp_path, family, dtype)
    mixes = ((8, 3), (5,))
    images = Images(layout, mixes, 4, targets, seed=1, room=1 << 20)
    assert images.region.size >= 1 << 20
    refs = [ref for mix in images.mixes for ref in mix]
    assert len(refs) == 8 and len({ref.digest for ref in refs}) == 8
    seen: list[torch.Tensor] = []
    for mix, ranks in zip(images.mixes, mixes, strict=True):
        for ref, rank in zip(mix, itertools.cycle(ranks)):
            size = size_of(layout, rank, targets)
            assert (ref.data_bytes, ref.stacked_rank) == (size.data_bytes, size.stacked_rank)
            image = images.region.view[ref.offset : ref.offset + size.total]
            pairs = read_image(image, layout)
            for a, b, scale in pairs.values():
                assert a.shape[0] == b.shape[1] == rank and scale == SCALE
                assert a.ne(0).all() and b.ne(0).all()
            assert as_written(pairs, layout) == bytes(image)
            seen.append(next(iter(pairs.values()))[0])
            del image
    for one, other in itertools.combinations(seen, 2):
        assert one.shape != other.shape or not torch.equal(one, other)
    images.region.close()


def as_written(pairs: dict, layout: ShardLayout) -> bytes:  # type: ignore[type-arg]
    """The image of the same matrices by `write_image`, the one that adapters from files go through."""
    weights = LoraWeights(
        {
            index: Pair(TensorMatrix(a), TensorMatrix(b), scale, "")
            for index, (a, b, scale) in pairs.items()
        }
    )
    out = bytearray(image_size(weights, layout).total)
    write_image(weights, layout, memoryview(out))
    return bytes(out)


def test_pool_is_a_ring() -> None:
    pool = Pool("float32", 0)
    whole = torch.cat(list(pool.pieces(0, 3 * len(pool.values) + 5)))
    assert torch.equal(whole, torch.cat([pool.values] * 3 + [pool.values[:5]]))
    assert pool.values.ne(0).all() and pool.values.isfinite().all()
    other = torch.empty(100)
    pool.fill(other, 7)
    assert not torch.equal(other, whole[:100])


def test_folders(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, "llama", "bfloat16")
    folders = Folders(layout, 6)
    folders.write(tmp_path / "a", 0)
    folders.write(tmp_path / "b", 1)
    folders.link(tmp_path / "c", tmp_path / "b", 2)
    region = HostRegion.create(1 << 22)
    found, end = [], 0
    for name in "abc":
        ref, end = stage(tmp_path / name, layout, region, end)
        found.append(ref)
    assert len({ref.digest for ref in found}) == 3
    assert {ref.data_bytes for ref in found} == {size_of(layout, 6).data_bytes}
    total = size_of(layout, 6).total
    b, c = (read_image(region.view[r.offset : r.offset + total], layout) for r in found[1:])
    for place, (matrix, _, scale) in b.items():
        assert torch.equal(matrix, c[place][0]) and scale == SCALE != c[place][2]
    inode = (tmp_path / "b" / "adapter_model.safetensors").stat().st_ino
    assert (tmp_path / "c" / "adapter_model.safetensors").stat().st_ino == inode
    size = (tmp_path / "a" / "adapter_model.safetensors").stat().st_size
    assert folders.num_bytes < size < folders.num_bytes + (1 << 14)
    region.close()


def test_unknown_target(tmp_path: Path) -> None:
    layout = layout_of(tmp_path, "llama", "float32")
    for make in (lambda: Images(layout, ((4,),), 1, ("x",)), lambda: Folders(layout, 4, ("x",))):
        with pytest.raises(ConfigError, match="no module 'x'"):
            make()


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_are_models_with_tokenizers(tmp_path: Path, shape: str) -> None:
    from engine.server.text import Text

    folder = write_model(tmp_path, shape)
    spec = spec_from(folder)
    given = SHAPES[shape]
    assert (spec.vocab, spec.num_layers, spec.hidden, spec.tied) == (
        given["vocab_size"],
        given["num_hidden_layers"],
        given["hidden_size"],
        given["tie_word_embeddings"],
    )
    text = Text(str(folder))
    try:
        prompt = "Hello, {world}!\n\tYes."
        ids = text._tokenizer.encode(prompt).ids
        assert len(ids) == len(prompt) and text.decode(ids) == prompt
        assert text._tokenizer.get_vocab_size() == spec.vocab
        last = text.decode([spec.vocab - 2, spec.vocab - 1])
        assert last.strip() and last.isascii()
    finally:
        text.close()


def test_weights_of_mistral_7b(tmp_path: Path) -> None:
    """An adapter of rank 16 on every linear has 84 MB."""
    config = ModelConfig(model_id=str(write_model(tmp_path, "mistral-7b")), dtype="bfloat16")
    layout, _, _ = adapter_layout(config)
    assert size_of(layout, 16).data_bytes == 83_886_080
