"""The host tier against a plain model of it, and the shared region."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.adapters.tiers import HostImage, HostRegion, HostTier
from engine.messages import IMAGE_ALIGN

CAPACITY = 16 * IMAGE_ALIGN


class TierMachine(RuleBasedStateMachine):
    """Random reservations, commits, leases and drops; every byte knows whose it should be."""

    def __init__(self) -> None:
        super().__init__()
        self.tier = HostTier(CAPACITY + 17)
        self.bytes: list[object] = [None] * (CAPACITY // IMAGE_ALIGN)
        self.reserved: dict[int, int] = {}
        self.leases: list[HostImage] = []
        self.committed: dict[bytes, HostImage] = {}

    @rule(size=st.integers(0, CAPACITY))
    def reserve(self, size: int) -> None:
        leased = {id(image) for image in self.leases}
        before = list(self.tier)
        offset = self.tier.reserve(size)
        units = max(1, -(-size // IMAGE_ALIGN))
        if offset is None:
            assert list(self.tier) == before, "nothing is evicted in vain"
            return
        gone = [image for image in before if image.digest not in self.tier]
        assert not any(id(image) in leased for image in gone)
        for image in gone:
            del self.committed[image.digest]
        for at in range(offset // IMAGE_ALIGN, offset // IMAGE_ALIGN + units):
            owner = self.bytes[at]
            assert owner is None or any(owner is image for image in gone)
        for image in gone:
            self._own(image.offset, image.num_bytes, None)
        self._own(offset, units * IMAGE_ALIGN, "reserved")
        self.reserved[offset] = units * IMAGE_ALIGN

    @precondition(lambda self: self.reserved)
    @rule(data=st.data(), digest=st.binary(min_size=1, max_size=1), keep=st.booleans())
    def finish(self, data: st.DataObject, digest: bytes, keep: bool) -> None:
        offset = data.draw(st.sampled_from(sorted(self.reserved)))
        size = self.reserved.pop(offset)
        self._own(offset, size, None)
        if not keep:
            return self.tier.abandon(offset)
        image = self.tier.commit(offset, digest)
        if digest in self.committed:
            assert image is self.committed[digest], "the first of two equal images is kept"
        else:
            self.committed[digest] = image
            self._own(offset, size, image)

    @precondition(lambda self: self.committed)
    @rule(data=st.data())
    def lease(self, data: st.DataObject) -> None:
        digest = data.draw(st.sampled_from(sorted(self.committed)))
        image = self.tier.lease(digest)
        assert image is self.committed[digest]
        self.leases.append(image)

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        image = self.leases.pop(data.draw(st.integers(0, len(self.leases) - 1)))
        self.tier.release(image)
        if self.committed.get(image.digest) is not image and image not in self.leases:
            self._own(image.offset, image.num_bytes, None)

    @rule(digest=st.binary(min_size=1, max_size=1))
    def drop(self, digest: bytes) -> None:
        image = self.committed.pop(digest, None)
        assert self.tier.drop(digest) == (image is not None)
        assert self.tier.lease(digest) is None
        if image is not None and image not in self.leases:
            self._own(image.offset, image.num_bytes, None)

    @invariant()
    def sound(self) -> None:
        self.tier.check()
        assert self.tier.used == IMAGE_ALIGN * sum(owner is not None for owner in self.bytes)
        assert {image.digest for image in self.tier} == set(self.committed)

    def _own(self, offset: int, size: int, owner: object) -> None:
        for at in range(offset // IMAGE_ALIGN, (offset + size) // IMAGE_ALIGN):
            self.bytes[at] = owner


TestTier = TierMachine.TestCase
TestTier.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_least_recently_used_goes_first() -> None:
    tier = HostTier(3 * IMAGE_ALIGN)
    for digest in (b"a", b"b", b"c"):
        offset = tier.reserve(1)
        assert offset is not None
        tier.commit(offset, digest)
    image = tier.lease(b"a")
    assert image is not None
    tier.release(image)
    assert tier.reserve(IMAGE_ALIGN) is not None
    assert b"b" not in tier and b"a" in tier and b"c" in tier and len(tier) == 2
    with pytest.raises(ValueError, match="do not fit"):
        tier.reserve(4 * IMAGE_ALIGN)


def test_fragments_are_not_evicted_in_vain() -> None:
    """Two free ends around a leased image do not hold what needs both."""
    tier = HostTier(3 * IMAGE_ALIGN)
    offsets = [tier.reserve(IMAGE_ALIGN) for _ in range(3)]
    for offset, digest in zip(offsets, (b"a", b"b", b"c"), strict=True):
        assert offset is not None
        tier.commit(offset, digest)
    image = tier.lease(b"b")
    assert image is not None
    assert tier.reserve(2 * IMAGE_ALIGN) is None and len(tier) == 3
    tier.release(image)
    assert tier.reserve(2 * IMAGE_ALIGN) is not None


def test_a_region_is_shared_and_lazy() -> None:
    region = HostRegion.create(
        64 << 30
    )  # more than there is: nothing is taken before it is written
    region.view[(64 << 30) - 3 :] = b"end"
    code = (
        "import sys; from engine.adapters.tiers import HostRegion;"
        "r = HostRegion.attach(int(sys.argv[1]));"
        "assert bytes(r.view[-3:]) == b'end'; r.view[:3] = b'new'; r.close(); r.close()"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(region.fd)], check=True, pass_fds=[region.fd], timeout=60
    )
    assert bytes(region.view[:3]) == b"new" and region.size == 64 << 30
    region.close()
    with pytest.raises(ValueError):
        region.view[0]


def test_a_region_without_memfd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    region = HostRegion.create(5000)
    region.view[:5] = b"hello"
    other = HostRegion.attach(os.dup(region.fd))
    assert bytes(other.view[:5]) == b"hello" and other.size == 4864
    kept = other.view[:5]
    other.close()
    assert bytes(kept) == b"hello", "what is still shown stays"
    region.close()
