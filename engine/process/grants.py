"""Adapters that the exchange holds for the front, kept for a while after their last request.

A *grant* is one answered `Acquire`. While it lasts, the image stays in place, even if the exchange restarts. Requests
for an adapter in use need no question while its version is fresh. While the exchange is away, they are served with the
last valid version. An unused grant is returned when the exchange recalls it for room, when there are too many, or when
its adapter is unloaded. If too few are unused for a recall, the next ones to become unused are returned at once.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import msgspec

from engine.adapters.ref import AdapterRef
from engine.messages import AdapterImageRef, AdapterStatus, AdapterText, Tier, is_meant
from engine.process.pipe_messages import Acquired

MAX_IDLE = 1024  # grants that no request uses
OUTAGE_S = 300.0  # a grant serves this long after its version expired, while the exchange is away

Key = tuple[AdapterRef, str | None]  # the reference and the caller's token


@dataclass(slots=True, eq=False)
class Grant:
    """One image, held in the exchange under the number of a call."""

    key: Key
    call: int
    image: AdapterImageRef
    cache_salt: bytes
    text: AdapterText | None
    fresh_until: float  # time.monotonic(); version and permission are valid until then
    users: int = 0
    retired: bool = False  # no longer granted; ends with its last user

    @property
    def is_fresh(self) -> bool:
        return time.monotonic() < self.fresh_until

    @property
    def serves_outage(self) -> bool:
        """Whether it may serve while the exchange is away."""
        return time.monotonic() < self.fresh_until + OUTAGE_S


class GrantLease:
    """One request's use of a grant: `engine.backend.Lease`."""

    def __init__(self, grants: Grants, grant: Grant, tier: Tier = "host") -> None:
        self.tier: Tier = tier
        self._grants: Grants | None = grants
        self._grant = grant
        grant.users += 1

    @property
    def image(self) -> AdapterImageRef:
        return self._grant.image

    @property
    def cache_salt(self) -> bytes:
        return self._grant.cache_salt

    @property
    def text(self) -> AdapterText | None:
        return self._grant.text

    def release(self) -> None:
        """Idempotent."""
        if self._grants is not None:
            grants, self._grants = self._grants, None
            grants.released(self._grant)


class Grants:
    """All grants. `give_back` returns a call's image to the exchange."""

    def __init__(self, give_back: Callable[[int], None]) -> None:
        self._give_back = give_back
        self._current: OrderedDict[Key, Grant] = OrderedDict()  # least recently used first
        self._retired: set[Grant] = set()
        self._recalled = 0  # bytes that the exchange still waits for

    def __len__(self) -> int:
        return len(self._current) + len(self._retired)

    def get(self, key: Key) -> Grant | None:
        """The newest grant of a key, fresh or not."""
        return self._current.get(key)

    def lease(self, grant: Grant, tier: Tier = "host") -> GrantLease:
        """Adds a user."""
        if grant.key in self._current:
            self._current.move_to_end(grant.key)
        return GrantLease(self, grant, tier)

    def add(self, key: Key, acquired: Acquired) -> GrantLease:
        """Makes a grant with one user from an answer. The same image is not held twice."""
        fresh_until = time.monotonic() + acquired.fresh_s
        old = self._current.get(key)
        if old is not None and _contents(old) == _contents(acquired):
            old.fresh_until = max(old.fresh_until, fresh_until)
            self._give_back(acquired.call)
            return self.lease(old, acquired.tier)
        if old is not None:
            self._retire(old)
        grant = Grant(
            key, acquired.call, acquired.image, acquired.cache_salt, acquired.text, fresh_until
        )
        self._current[key] = grant
        lease = GrantLease(self, grant, acquired.tier)
        idle = [one for one in self._current.values() if not one.users]
        for surplus in idle[: max(0, len(idle) - MAX_IDLE)]:
            self._retire(surplus)
        return lease

    def released(self, grant: Grant) -> None:
        """Removes a user. Called by leases."""
        grant.users -= 1
        if grant.users:
            return
        if grant.retired:
            self._retired.discard(grant)
            self._give_back(grant.call)
        elif self._recalled > 0:
            self.recall(self._recalled)

    def refused(self, key: Key) -> None:
        """The exchange refused the key: its grant serves no new request."""
        if (old := self._current.get(key)) is not None:
            self._retire(old)

    def forget(
        self, name: str, source: str | None = None, tenants: Collection[bytes] | None = None
    ) -> None:
        """The adapter was unloaded: grants of every version end with their last user. See `Backend.unload`."""
        for grant in list(self._current.values()):
            if is_meant(grant.image, name, source, tenants):
                self._retire(grant)

    def recall(self, num_bytes: int) -> None:
        """Returns unused grants, the least recently used first, until they free `num_bytes`."""
        idle = [one for one in self._current.values() if not one.users]
        for grant in idle:
            if num_bytes <= 0:
                break
            num_bytes -= grant.image.data_bytes
            self._retire(grant)
        self._recalled = num_bytes

    def held(self) -> dict[int, AdapterImageRef]:
        """Call -> image of everything that the exchange must keep in place."""
        return {one.call: one.image for one in (*self._current.values(), *self._retired)}

    def with_users(self, statuses: Iterable[AdapterStatus]) -> list[AdapterStatus]:
        """The exchange's list with a lease for each request. The exchange counts one for each grant."""
        users, counted = self.users(), []
        for status in statuses:
            grants, requests = users.get(status.digest or b"", (0, 0))
            leases = max(0, status.leases - grants) + requests
            counted.append(msgspec.structs.replace(status, leases=leases))
        return counted

    def users(self) -> dict[bytes, tuple[int, int]]:
        """Digest -> (grants, requests that use them)."""
        found: dict[bytes, tuple[int, int]] = {}
        for one in (*self._current.values(), *self._retired):
            grants, users = found.get(one.image.digest, (0, 0))
            found[one.image.digest] = (grants + 1, users + one.users)
        return found

    def idle(self) -> dict[bytes, int]:
        """Digest -> grants that no request uses."""
        return dict(Counter(one.image.digest for one in self._current.values() if not one.users))

    def _retire(self, grant: Grant) -> None:
        del self._current[grant.key]
        grant.retired = True
        if grant.users:
            self._retired.add(grant)
        else:
            self._give_back(grant.call)


def _contents(one: Grant | Acquired) -> tuple[AdapterImageRef, bytes, bytes]:
    """Image, salt and digest of the text."""
    return one.image, one.cache_salt, one.text.digest if one.text else b""
