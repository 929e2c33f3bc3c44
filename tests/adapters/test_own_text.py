"""What the exchange reads in an adapter's tokenizer files: the differences, or a typed refusal, in bounded memory."""

from __future__ import annotations

import json
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken as TheirToken
from tokenizers import Tokenizer, decoders, models, normalizers, processors
from transformers import AutoTokenizer

from engine.adapters.exchange import Exchange
from engine.adapters.own_text import MAX_TEMPLATE_BYTES, MAX_TOKENS
from engine.adapters.ref import AdapterRef
from engine.adapters.text_files import TEMPLATE, TOKENIZER, TOKENIZER_CONFIG
from engine.adapters.tiers import HostRegion
from engine.config import AdapterConfig, EngineConfig, ModelConfig
from engine.errors import AdapterIncompatible
from engine.lora.recipe import Recipe
from tests.lora import tiny
from tests.server.fake import write_tokenizer
from tests.server.own import TEMPLATE_TEXT, edited, read, widened, with_template, write

Json = dict[str, Any]
LAYOUT = tiny.llama_layout("bfloat16")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def given(base: Path) -> Json:
    found: Json = json.loads((base / TOKENIZER).read_text())
    return found


def token(id: Any, content: Any = "<new>", **flags: Any) -> Json:
    return {"id": id, "content": content, "normalized": False, "special": False, **flags}


def test_what_differs_is_read(base: Path, tmp_path: Path) -> None:
    assert read(base, base).text is None
    found = read(base, widened(base, tmp_path))
    assert found.text is not None and not found.notes
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    decoder = theirs.backend_tokenizer.get_added_tokens_decoder()
    assert {one.id: str(TheirToken(one.content)) for one in found.text.tokens} == {
        id: str(entry) for id, entry in decoder.items() if id >= 400
    }
    for one in found.text.tokens:
        flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
        assert [getattr(one, flag) for flag in flags] == [
            getattr(decoder[one.id], flag) for flag in flags
        ]
    assert found.text.template == theirs.chat_template == TEMPLATE_TEXT
    assert found.text.specials == theirs.special_tokens_map


def test_the_template_and_the_ends_may_differ_alone(base: Path, tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    for content in ("yes", named):
        (tmp_path / TOKENIZER_CONFIG).write_text(json.dumps({"chat_template": content}))
        found = read(base, tmp_path).text
        assert found is not None and found.template == "yes" and not found.tokens
    with_template(tmp_path, "the file comes first")
    found = read(base, tmp_path).text
    assert found is not None and found.template == "the file comes first"
    (tmp_path / TEMPLATE).write_bytes((base / TEMPLATE).read_bytes())
    config = json.loads((base / TOKENIZER_CONFIG).read_text()) | {"chat_template": None}
    for eos, own in (("</s>", False), ({"content": "</s>"}, False), ("<|im_end|>", True)):
        (tmp_path / TOKENIZER_CONFIG).write_text(json.dumps(config | {"eos_token": eos}))
        assert (read(base, tmp_path).text is not None) == own
    (tmp_path / TOKENIZER_CONFIG).write_text(json.dumps(config | {"pad_token": "</s>"}))
    assert read(base, tmp_path).text is None, "nothing uses it"


def test_other_ways_to_write_the_same(base: Path, given: Json, tmp_path: Path) -> None:
    """Old versions write merges as texts, and lack fields; the order of the vocabulary says nothing."""
    model = dict(given["model"]) | {"dropout": None, "ignore_merges": False, "new_field": None}
    model["merges"] = [" ".join(pair) for pair in model["merges"]]
    model["vocab"] = dict(reversed(model["vocab"].items()))
    model.pop("fuse_unk")
    pre_tokenizer = dict(given["pre_tokenizer"])
    pre_tokenizer.pop("use_regex")
    added = [*given["added_tokens"], token(400)]
    folder = edited(
        base,
        tmp_path,
        model=model,
        pre_tokenizer=pre_tokenizer,
        added_tokens=added,
        normalizer=None,
    )
    found = read(base, folder)
    assert found.text is not None and [one.id for one in found.text.tokens] == [400]
    assert not found.notes


PARTS: dict[str, Callable[[Json], Json]] = {
    "model": lambda model: model | {"vocab": model["vocab"] | {"hello": 7}},
    "model ": lambda model: model | {"merges": model["merges"][1:]},
    "model  ": lambda model: model | {"byte_fallback": True},
    "normalizer": lambda _: {"type": "Lowercase"},
    "pre_tokenizer": lambda part: part | {"add_prefix_space": True},
    "decoder": lambda _: {"type": "Fuse"},
}


def test_another_tokenizer_is_not_used(base: Path, given: Json, tmp_path: Path) -> None:
    """Without new ids the adapter is served with the base's, and a note names the part; with new ones it is refused."""
    for name, change in PARTS.items():
        part = name.strip()
        changes = {part: change(given[part])}
        found = read(base, edited(base, tmp_path / "old", **changes))
        assert found.text is None
        assert found.notes == (
            f"tokenizer.json is not used: it differs from the base model's in: {part}",
        )
        changes["added_tokens"] = [*given["added_tokens"], token(400)]
        with pytest.raises(
            AdapterIncompatible, match=f"adds 1 tokens, but differs .* in: {part}"
        ) as e:
            read(base, edited(base, tmp_path / "new", **changes))
        assert e.value.field == TOKENIZER and "save_pretrained" in (e.value.hint or "")
    post = {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {}}
    added = [*given["added_tokens"], token(400)]
    found = read(base, edited(base, tmp_path, post_processor=post, added_tokens=added))
    assert found.text is not None and "post_processor" in found.notes[0]


def test_a_tokenizer_that_transformers_rebuilds(tmp_path: Path) -> None:
    """Llama 2's file has a normalizer; transformers 5 loads, and saves, a pre-tokenizer in its place."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2, "▁": 3, "a": 4, "b": 5, "▁a": 6}
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(
        [TheirToken(name, normalized=False, special=True) for name in ("<unk>", "<s>", "</s>")]
    )
    base = tmp_path / "base"
    base.mkdir()
    tokenizer.save(str(base / TOKENIZER))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (base / TOKENIZER_CONFIG).write_text(json.dumps(config | {"unk_token": "<unk>"}))
    (base / "config.json").write_text('{"model_type": "llama"}')
    loaded = AutoTokenizer.from_pretrained(base)
    loaded.add_tokens(["<new>"])
    loaded.save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / TOKENIZER).read_text())
    assert saved["normalizer"] is None, "else there is nothing to test"
    found = read(base, tmp_path / "adapter", vocab=8)
    assert found.text is not None and [one.content for one in found.text.tokens] == ["<new>"]


def test_rows_of_the_embedding(base: Path, given: Json, tmp_path: Path) -> None:
    """A token needs a row, but for padding, which is never in a prompt."""
    added = [*given["added_tokens"], token(400), token(401, "<pad>")]
    folder = edited(base, tmp_path, added_tokens=added)
    (folder / TOKENIZER_CONFIG).write_text('{"pad_token": "<pad>", "eos_token": "</s>"}')
    assert len(getattr(read(base, folder, 402).text, "tokens", ())) == 2
    found = read(base, folder, 401)
    assert [one.id for one in getattr(found.text, "tokens", ())] == [400]
    assert found.notes == ("the padding token '<pad>' is not used: it has no row",)
    with pytest.raises(AdapterIncompatible, match="'<new>' has the id 400; the embedding has 400"):
        read(base, folder, 400)


NESTED = b"[" * 1_000_000
HOSTILE: dict[str, tuple[Any, str]] = {
    "not JSON": (b"{", "cannot be read"),
    "not an object": (b"[]", "cannot be read"),
    "nested": (b'{"model": ' + NESTED, "cannot be read"),
    "nested tokens": (b'{"added_tokens": ' + NESTED, "cannot be read"),
    "nested part": (b'{"decoder": ' + NESTED, "cannot be read"),
    "no model": ({"model": None}, "cannot be read"),
    "vocabulary": ({"model": {"vocab": 3}}, "cannot be read"),
    "ids of the vocabulary": ({"model": {"vocab": {"a": "b"}}}, "cannot be read"),
    "merges": ({"model": {"vocab": {}, "merges": [[]]}}, "cannot be read"),
    "two ids": ([token(400), token(400, "<b>")], "have the same id"),
    "two contents": ([token(400), token(401)], "have the same content"),
    "negative": ([token(-1)], "has the id -1"),
    "huge": ([token(1 << 31)], "has the id"),
    "float": ([token(400.5)], "cannot be read"),
    "text": ([token("400")], "cannot be read"),
    "content": ([token(400, 7)], "cannot be read"),
    "flag": ([token(400, special="yes")], "cannot be read"),
    "empty": ([token(400, "")], "has 0 characters"),
    "long": ([token(400, "x" * 257)], "has 257 characters"),
    "gap": ([token(402)], "has the id 402; loaded, it would have 400"),
    "known": ([token(400, "e")], "has the id 400; loaded, it would have"),
    "taken": ([token(7, "<other>")], "has the id 7; loaded, it would have 400"),
    "many": ([token(400 + at, f"<{at}>") for at in range(MAX_TOKENS + 1)], "changes 1025 tokens"),
    "very many": ([token(400 + at, f"<{at}>") for at in range(20_000)], "more than 16384"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_tokenizers(base: Path, given: Json, tmp_path: Path, kind: str) -> None:
    content, reason = HOSTILE[kind]
    if isinstance(content, list):
        content = given | {"added_tokens": [*given["added_tokens"], *content]}
    write(tmp_path, content if isinstance(content, bytes) else given | content)
    with pytest.raises(AdapterIncompatible) as caught:
        read(base, tmp_path, 0)
    assert reason in caught.value.message and "tokenizer.json" in caught.value.message
    assert "save_pretrained" in (caught.value.hint or "") or "base model" in caught.value.hint


def test_a_huge_vocabulary_costs_no_memory(base: Path, tmp_path: Path) -> None:
    """It differs from the base's, so it is not decoded."""
    entries = b",".join(b'"%d":%d' % (at, at) for at in range(1_000_000))
    write(tmp_path, b'{"model":{"vocab":{' + entries + b"}}}")
    read(base, base)
    tracemalloc.start()
    found = read(base, tmp_path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert found.text is None and "model" in found.notes[0]
    assert peak < 4 * len(entries)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        (TOKENIZER_CONFIG, b"[]"),
        (TOKENIZER_CONFIG, b"{"),
        (TOKENIZER_CONFIG, b'{"a":' + NESTED),
        (TOKENIZER_CONFIG, b'{"a":[' + b"1," * 300_000 + b"1]}"),
        (TOKENIZER_CONFIG, b'{"chat_template": 3}'),
        (TOKENIZER_CONFIG, json.dumps({"eos_token": "x" * 257}).encode()),
        (TOKENIZER_CONFIG, json.dumps({f"{at}_token": "x" for at in range(65)}).encode()),
        (TEMPLATE, b"\xff"),
        (TEMPLATE, b"x" * (MAX_TEMPLATE_BYTES + 1)),
    ],
)
def test_hostile_settings(base: Path, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AdapterIncompatible, match=rf"{name} cannot be read|the chat template has"):
        read(base, tmp_path)


async def test_the_exchange(saved: Path, base: Path, tmp_path: Path) -> None:
    """A lease brings the text; another template is another version of the same image; a merge has the base's."""
    root = tmp_path / "root"
    for name in ("a", "b"):
        shutil.copytree(saved / name, root / name)
    with_template(root / "a", "first")
    adapters = AdapterConfig(adapter_root=(str(root),), adapter_source="local")
    config = EngineConfig(model=ModelConfig(model_id=str(base)), adapters=adapters)
    region = HostRegion.create(1 << 22)
    exchange = Exchange(config, LAYOUT, region)
    try:
        with await exchange.acquire(AdapterRef(("a",))) as first:
            assert first.text is not None and first.text.template == "first"
        with await exchange.acquire(AdapterRef(("b",))) as other:
            assert other.text is None
        merged = AdapterRef.merged(["a", "b"], Recipe.parse([1.0, 1.0], "linear", None, "total", 0))
        with await exchange.acquire(merged) as both:
            assert both.text is None
        with_template(root / "a", "second")
        versions = exchange._versions
        versions.forget("a")
        with await exchange.acquire(AdapterRef(("a",))) as second:
            assert second.text is not None and second.text.template == "second"
            assert second.image.digest == first.image.digest
        added = json.loads((base / TOKENIZER).read_text())["added_tokens"]
        edited(base, root / "b", added_tokens=[*added, token(400)])
        versions.forget("b")
        with pytest.raises(AdapterIncompatible, match=f"has {LAYOUT.targets.vocab} rows"):
            await exchange.acquire(AdapterRef(("b",)))
    finally:
        await exchange.close()
        region.close()
