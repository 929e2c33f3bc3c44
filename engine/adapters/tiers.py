"""Adapters in host memory: one shared region and its allocator.

`HostRegion` is memory that several processes map. The exchange writes images into it; the shards copy them to the
device. `HostTier` allocates it: first fit, leases, and eviction of the least recently used image without a lease. It
uses plain integers and belongs to one task; it is not thread-safe.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from engine.messages import IMAGE_ALIGN, aligned


class HostRegion:
    """Shared memory of a fixed size. The kernel allocates a page at its first write, so an unused region is free."""

    def __init__(self, fd: int, size: int) -> None:
        self.fd = fd
        self.size = size
        self._map = mmap.mmap(fd, size, flags=mmap.MAP_SHARED)
        self.view = memoryview(self._map)

    @classmethod
    def create(cls, size: int) -> HostRegion:
        """A new region of `size` bytes: a memfd, which the size of /dev/shm does not limit, or else an unlinked file.

        Other processes map it by its `fd`, which they inherit (`pass_fds`) or receive over a socket.
        """
        size = max(size, IMAGE_ALIGN) // IMAGE_ALIGN * IMAGE_ALIGN
        if hasattr(os, "memfd_create"):
            fd = os.memfd_create("lorax-adapters", os.MFD_CLOEXEC)
        else:
            with tempfile.TemporaryFile() as file:
                fd = os.dup(file.fileno())
        try:
            os.ftruncate(fd, size)
            return cls(fd, size)
        except BaseException:
            os.close(fd)
            raise

    @classmethod
    def attach(cls, fd: int) -> HostRegion:
        """The region of another process's `fd`. Takes ownership of the descriptor."""
        return cls(fd, os.fstat(fd).st_size)

    def close(self) -> None:
        """Unmaps the region. Memory that a tensor still uses stays mapped until the tensor is freed."""
        if self.fd < 0:
            return
        with contextlib.suppress(BufferError):
            self.view.release()
            self._map.close()
        os.close(self.fd)
        self.fd = -1


@dataclass(slots=True)
class HostImage:
    """One image in the region."""

    digest: bytes
    offset: int  # bytes
    num_bytes: int
    leases: int = 0
    doomed: bool = False  # no longer found; freed when its last lease ends


class HostTier:
    """The allocator of the region.

    An interval is *reserved* while an image is written, then *committed* under its digest. A leased image stays in
    place; an image without leases may be evicted.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity // IMAGE_ALIGN * IMAGE_ALIGN
        self._images: OrderedDict[bytes, HostImage] = OrderedDict()  # least recently used first
        self._doomed: dict[int, HostImage] = {}  # by offset
        self._reserved: dict[int, int] = {}  # offset -> bytes
        self.num_evictions = 0

    def __len__(self) -> int:
        return len(self._images)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._images

    def __iter__(self) -> Iterator[HostImage]:
        return iter(tuple(self._images.values()))

    @property
    def used(self) -> int:
        """Bytes of images and reservations."""
        return sum(size for _, size in self._intervals())

    def leased(self, idle: Mapping[bytes, int]) -> int:
        """Bytes of images with leases. `idle`: digest -> leases that do not count."""
        images = [one for one in self._images.values() if one.leases > idle.get(one.digest, 0)]
        return sum(image.num_bytes for image in (*images, *self._doomed.values()))

    def _intervals(self, leased_only: bool = False) -> list[tuple[int, int]]:
        """Sorted (offset, bytes) of all images and reservations, or only of those that cannot be evicted."""
        images = [image for image in self._images.values() if image.leases or not leased_only]
        taken = [(image.offset, image.num_bytes) for image in (*images, *self._doomed.values())]
        return sorted([*taken, *self._reserved.items()])

    def _first_fit(self, size: int, leased_only: bool = False) -> int | None:
        end = 0
        for offset, taken in self._intervals(leased_only):
            if offset - end >= size:
                return end
            end = offset + taken
        return end if self.capacity - end >= size else None

    def reserve(self, num_bytes: int) -> int | None:
        """Reserves `num_bytes` and returns their offset. Evicts images as needed, the least recently used first.

        None, without evictions, if leased images leave no gap. Raises ValueError if it exceeds the capacity.
        """
        size = max(IMAGE_ALIGN, aligned(num_bytes))
        if size > self.capacity:
            raise ValueError(f"{num_bytes} bytes do not fit into a tier of {self.capacity} bytes")
        if self._first_fit(size, leased_only=True) is None:
            return None
        while (offset := self._first_fit(size)) is None:
            victim = next(image for image in self._images.values() if not image.leases)
            del self._images[victim.digest]
            self.num_evictions += 1
        self._reserved[offset] = size
        return offset

    def commit(self, offset: int, digest: bytes) -> HostImage:
        """Marks the image at a reserved offset as complete. If the tier has the same image, that one is kept."""
        size = self._reserved.pop(offset)
        if digest not in self._images:
            self._images[digest] = HostImage(digest, offset, size)
        self._images.move_to_end(digest)
        return self._images[digest]

    def abandon(self, offset: int) -> None:
        """Cancels a reservation."""
        del self._reserved[offset]

    def lease(self, digest: bytes) -> HostImage | None:
        """Keeps an image in place until `release`. None if it is not in the tier."""
        image = self._images.get(digest)
        if image is not None:
            image.leases += 1
            self._images.move_to_end(digest)
        return image

    def adopt(self, digest: bytes, offset: int, num_bytes: int) -> HostImage:
        """Leases an image that a previous tier left in the region.

        Raises ValueError if the interval is outside of the region or overlaps another.
        """
        size = max(IMAGE_ALIGN, aligned(num_bytes))
        known = self._images.get(digest)
        found = known if known is not None and known.offset == offset else self._doomed.get(offset)
        if found is None:
            taken = self._intervals()
            apart = all(offset + size <= at or at + length <= offset for at, length in taken)
            if offset % IMAGE_ALIGN or offset < 0 or offset + size > self.capacity or not apart:
                raise ValueError(
                    f"an image of {num_bytes} bytes at {offset} is out of range or overlaps"
                )
            found = HostImage(digest, offset, size, doomed=known is not None)
            if known is None:
                self._images[digest] = found
            else:
                self._doomed[offset] = found
        found.leases += 1
        return found

    def hold(self, image: HostImage) -> None:
        """Adds a lease to an image that has one."""
        assert image.leases > 0, "an image without leases may be gone"
        image.leases += 1

    def release(self, image: HostImage) -> None:
        """Ends one lease."""
        assert image.leases > 0, "a lease is released once"
        image.leases -= 1
        if image.doomed and not image.leases:
            del self._doomed[image.offset]

    def drop(self, digest: bytes) -> bool:
        """Removes an image; its bytes are free when its last lease ends. False if it is not in the tier."""
        image = self._images.pop(digest, None)
        if image is None:
            return False
        if image.leases:
            image.doomed = True
            self._doomed[image.offset] = image
        return True

    def check(self) -> None:
        """Asserts the invariants: intervals are aligned, within the region and disjoint; leases are counted."""
        end = 0
        for offset, size in self._intervals():
            assert offset % IMAGE_ALIGN == 0 and size % IMAGE_ALIGN == 0 and size > 0
            assert offset >= end, "intervals overlap"
            end = offset + size
        assert end <= self.capacity
        for digest, image in self._images.items():
            assert image.digest == digest and image.leases >= 0 and not image.doomed
        for offset, image in self._doomed.items():
            assert image.offset == offset and image.leases > 0 and image.doomed
