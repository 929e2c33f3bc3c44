"""The salt of a request's prefix cache: only requests with equal salts share cached prompts."""

from __future__ import annotations

import hashlib

from engine.server.keys import Tenant

SALT_BYTES = 16


def salt_of(lease_salt: bytes, given: str | None, tenant: Tenant | None) -> bytes:
    """Combines the salt of a private adapter's lease (empty for others), the client's `cache_salt` and the tenant.

    Each part says whether it was given and how long it is, so that no part can pose as another.
    """
    if given is None and tenant is None:
        return lease_salt
    state = hashlib.blake2b(digest_size=SALT_BYTES, person=b"cache-salt")
    name = None if tenant is None else tenant.name
    for part in (lease_salt, _encoded(given), _encoded(name)):
        state.update(b"-" if part is None else b"+" + len(part).to_bytes(8, "little") + part)
    return state.digest()


def _encoded(text: str | None) -> bytes | None:
    return None if text is None else text.encode("utf-8", "surrogatepass")
