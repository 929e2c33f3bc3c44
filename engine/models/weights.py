"""Weights: streamed from safetensors into their destination and fused while they are read, or random.

Every tensor of the checkpoint has one destination. A tensor without one, or a destination left empty, is an error
that names it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from engine.checkpoint import WHOLE_NAMES, cache_folder
from engine.errors import AdapterError, ModelError
from engine.files import DESCRIPTORS, OpenFile, Outside
from engine.layers.linear import Linear, Part
from engine.layers.norm import LayerNorm, RmsNorm
from engine.models.decoder import Decoder
from engine.models.spec import Learned, ModelSpec
from engine.ops.layout import TargetPart
from engine.ops.targets import Span
from engine.sandbox import Converter, is_pickle

MAX_INDEX_BYTES = 64 << 20
CONVERTED = "lorax-converted-models"  # apart from those of adapters, which are removed for others
CONVERT = "convert it to safetensors with save_pretrained of transformers"

Tensors = Iterator[tuple[str, Tensor]]  # by their names in the checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Destination:
    """Where one tensor of the checkpoint goes; `shape` is its shape there."""

    shape: tuple[int, ...]
    store: Callable[[Tensor], None]
    linear: Linear | None = None  # the linear that it is a part of


def destinations(model: Decoder) -> dict[str, Destination]:
    """Every tensor that the model needs, by its name in the checkpoint."""
    spec, names = model.spec, model.spec.names
    found: dict[str, Destination] = {}

    def whole(name: str, tensor: Tensor, plus: float = 0.0) -> None:
        found[name] = Destination(tuple(tensor.shape), partial(_copy, tensor, plus))

    def vocabulary(table: Tensor, name: str, tokens: Span) -> None:
        """The table has the rows of `tokens`."""
        shape = (spec.vocab, table.shape[1])
        found[name] = Destination(
            shape, lambda new: _copy(table, 0.0, cut(new, 0, (tokens,), spec.vocab))
        )

    def fused(linear: Linear) -> None:
        row = 0
        for target in linear.group.targets:
            module = target.whole.module.format(layer=linear.layer)
            sizes = (target.whole.out_features, linear.group.whole.in_features)
            for part in linear.method.parts(*sizes, bias=linear.bias, transposed=names.transposed):
                found[f"{module}.{part.name}"] = Destination(
                    part.shape, partial(_load, linear, target, part, row), linear
                )
            row += target.out_features

    def normed(name: str, norm: RmsNorm | LayerNorm) -> None:
        whole(f"{name}.weight", norm.weight, 1.0 if spec.norm.plus_one else 0.0)
        if norm.bias is not None:
            whole(f"{name}.bias", norm.bias)

    vocabulary(model.embedding.table, f"{names.embedding}.weight", model.embedding.group.inputs)
    if model.position_table is not None:
        assert isinstance(spec.position, Learned)
        whole(f"{spec.position.name}.weight", model.position_table)
    for number, layer in enumerate(model.layers):
        prefix = names.layer.format(layer=number)
        fused(layer.attention.qkv)
        fused(layer.attention.out)
        if layer.attention.norms is not None:
            q, k = layer.attention.norms
            normed(f"{prefix}.{names.q_norm}", q)
            normed(f"{prefix}.{names.k_norm}", k)
        fused(layer.mlp.up)
        fused(layer.mlp.down)
        for name, norm in (
            (names.attention_norm, layer.attention_norm),
            (names.mlp_norm, layer.mlp_norm),
            (names.after_attention_norm, layer.after_attention),
            (names.after_mlp_norm, layer.after_mlp),
        ):
            if norm is not None:
                normed(f"{prefix}.{name}", norm)
    normed(names.norm, model.final_norm)
    if not spec.tied:
        (head,) = model.head.group.targets
        vocabulary(model.vocabulary.weight, f"{names.head}.weight", *head.outputs)
    return found


def _copy(target: Tensor, plus: float, new: Tensor) -> None:
    target.copy_(new.float() + plus if plus else new)


def _load(linear: Linear, target: TargetPart, part: Part, row: int, new: Tensor) -> None:
    """Loads the shard's part of one tensor."""
    if part.outputs is not None:
        new = cut(new, part.outputs, target.outputs, target.whole.out_features)
    if part.inputs is not None:
        group = linear.group
        new = cut(new, part.inputs, (group.inputs,), group.whole.in_features)
    linear.method.load(part.name, row, new.movedim(part.outputs, 0) if part.outputs else new)


def cut(tensor: Tensor, dimension: int, spans: tuple[Span, ...], features: int) -> Tensor:
    """The `spans` of a dimension of `features` features. One entry may hold several features: a pack or a block."""
    if spans == (Span(0, features),):
        return tensor
    length = tensor.shape[dimension]
    pieces = []
    for span in spans:
        start, rest = divmod(span.start * length, features)
        size, more = divmod(span.size * length, features)
        assert not rest and not more, "a span cuts a pack or a block of features"
        pieces.append(tensor.narrow(dimension, start, size))
    return torch.cat(pieces, dimension)


def weight_files(folder: Path) -> tuple[list[Path], bool]:
    """The files of a checkpoint, and whether an index names them: safetensors, else torch.save's `.bin`."""
    for whole in WHOLE_NAMES:
        index = folder / f"{whole}.index.json"
        if index.exists():
            return [folder / name for name in _names(index)], True
        if (folder / whole).exists():
            return [folder / whole], False
    raise ModelError(f"{folder} has neither {' nor '.join(WHOLE_NAMES)}", field="model_id")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _names(index: Path) -> list[str]:
    try:
        with OpenFile(index) as file:
            if file.size > MAX_INDEX_BYTES:
                raise ModelError(
                    f"{index} is larger than {MAX_INDEX_BYTES >> 20} MiB", field="model_id"
                )
            found = msgspec.json.decode(file.read(), type=_Index)
    except OSError as error:
        raise ModelError(f"cannot read {index}: {error.strerror}", field="model_id") from None
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{index} is not an index of weights: {error}", field="model_id") from None
    return sorted(set(found.weight_map.values()))


def _opened(path: Path, roots: list[Path] | None) -> OpenFile:
    try:
        return OpenFile(path, roots)
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist", field="model_id") from None
    except Outside:
        raise ModelError(
            f"{path} lies outside the model's folder",
            field="model_id",
            hint="copy it into the folder: an index may name files of its own folder only",
        ) from None
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror}", field="model_id") from None


def _tensors(folder: Path, cache: Path) -> Tensors:
    """Every tensor of a checkpoint. A `.bin` is converted into the cache first, and read from there."""
    paths, indexed = weight_files(folder)
    roots = [folder.resolve(), cache.resolve()] if indexed else None
    with closing(Converter(cache, folder=CONVERTED)) as converter:
        for path in paths:
            with _opened(path, roots) as file:
                if is_pickle(file):
                    logger.info("converting %s to safetensors, unless the cache has it", path)
                try:
                    readable = converter.readable(file)
                except AdapterError as error:
                    raise ModelError(error.message, field="model_id", hint=CONVERT) from None
                with readable:
                    yield from _stored(readable, path)


def _stored(file: OpenFile, path: Path) -> Tensors:
    """The tensors of one safetensors file, opened by its descriptor; `path` is for messages."""
    name = DESCRIPTORS / str(file.fd)
    try:
        with safe_open(name if name.exists() else file.path, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118 - not a dict
                yield key, opened.get_tensor(key)
    except SafetensorError as error:
        raise ModelError(
            f"{path} is not a valid safetensors file: {error}", field="model_id"
        ) from None


def load(
    model: Decoder,
    folder: Path,
    cache: Path | None = None,
    change: Callable[[Tensors], Tensors] = iter,
) -> None:
    """Fills the model from a checkpoint. Raises ModelError that names a missing, unknown or wrongly shaped tensor.

    `cache`: the folder of downloads; None: huggingface_hub's. `change`: what becomes of the tensors, which have their
    right shapes.
    """
    expected = destinations(model)
    missing = set(expected)
    stored = _checked(model.spec, expected, _tensors(folder, cache or cache_folder()))
    for name, tensor in change(stored):
        expected[name].store(tensor)
        missing.discard(name)
    if missing:
        raise ModelError(
            f"the checkpoint lacks {len(missing)} tensors, first {min(missing)!r}", field="model_id"
        )


def _checked(spec: ModelSpec, expected: Mapping[str, Destination], tensors: Tensors) -> Tensors:
    """The tensors by the names in `expected`, without those that the model does not need. Raises ModelError."""
    prefix = spec.names.embedding.partition(".")[0] + "."
    tied_head = f"{spec.names.head}.weight" if spec.tied else ""
    for name, tensor in tensors:
        # Checkpoints saved from the bare model lack the first part of the name (gpt2 on the hub).
        key = name if name in expected else prefix + name
        if key not in expected:
            if name == tied_head or name.endswith(spec.names.ignored):
                continue
            raise ModelError(
                f"tensor {name!r} is not part of a {spec.model_type} model", field="model_id"
            )
        destination = expected[key]
        if tuple(tensor.shape) != destination.shape:
            raise ModelError(
                f"tensor {name!r} has shape {list(tensor.shape)}, config.json says {list(destination.shape)}",
                field="model_id",
            )
        yield key, tensor


def init_random(model: Decoder, seed: int = 0) -> None:
    """Random weights of the real shapes (`--load-format dummy`): activations keep a sane scale, norms are one."""
    generator = torch.Generator(model.device).manual_seed(seed)
    for name, destination in destinations(model).items():
        new = torch.empty(destination.shape, device=model.device)
        if "norm" in name or "ln_" in name:
            new.fill_(0.0 if model.spec.norm.plus_one or name.endswith("bias") else 1.0)
        else:
            new.normal_(0.0, 0.02, generator=generator)
        destination.store(new.to(model.dtype))


def size(model: Decoder) -> int:
    """Bytes of all weights, quantised ones as stored."""
    found = destinations(model).values()
    whole = sum(math.prod(one.shape) for one in found if one.linear is None) * model.dtype.itemsize
    return whole + sum(linear.method.size for linear in _linears(model))


def scratch(model: Decoder) -> int:
    """Bytes that a linear's matmul takes besides its input and output, at most."""
    return max(linear.method.scratch for linear in _linears(model))


def _linears(model: Decoder) -> set[Linear]:
    return {one.linear for one in destinations(model).values() if one.linear is not None}
