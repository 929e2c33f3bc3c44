"""What a client writes, and what is understood."""

from __future__ import annotations

import pytest

from engine.adapters.ref import AdapterRef, refuse_merged
from engine.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "id", "revision"),
    [
        ("org/name", "org/name", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
        ("a@b@c", "a@b", "c"),
        (" plain ", "plain", None),
        ("/folder/of@home/x", "/folder/of", "home/x"),  # the local source tries the whole first
        ("name@", "name@", None),
        ("@name", "@name", None),
        ("dir/@x", "dir/@x", None),
    ],
)
def test_ids(text: str, id: str, revision: str | None) -> None:
    ref = AdapterRef.parse(text)
    assert (ref.id, ref.revision, ref.source) == (id, revision, None)
    assert ref.name == text.strip()


def test_sources() -> None:
    assert AdapterRef.parse("a", "HUB").source == "hub"
    assert AdapterRef.parse("a", " Local").source == "local"
    assert AdapterRef.parse("a", "").source is None
    assert AdapterRef.parse("a", "anything").source == "anything"  # the registry knows which exist
    for source in ("a\0b", "\ud800", "x" * 65):
        with pytest.raises(InvalidRequest) as caught:
            AdapterRef.parse("a", source)
        assert caught.value.field == "adapter_source"


@pytest.mark.parametrize("text", ["", "  ", "a\0b", "a\nb", "x" * 2000])
def test_bad_ids(text: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        AdapterRef.parse(text)
    assert caught.value.field == "adapter_id"


def test_merged_adapters_are_refused() -> None:
    with pytest.raises(InvalidRequest) as caught:
        refuse_merged(AdapterRef(("a", "b")))
    assert caught.value.field == "merged_adapters"
