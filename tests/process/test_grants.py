"""What the front holds of the exchange's images, against a model of it: nothing twice, nothing for ever."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from engine.adapters.ref import AdapterRef
from engine.messages import AdapterImageRef, AdapterText
from engine.process import grants as module
from engine.process.grants import GrantLease, Grants, Key
from engine.process.pipe_messages import Acquired

SIZE = 1000


def key(name: str, token: str | None = None) -> Key:
    return AdapterRef((name,)), token


def acquired(call: int, name: str, version: int = 0, fresh_s: float = 100.0) -> Acquired:
    image = AdapterImageRef(f"{name}{version}".encode(), 256 * version, SIZE, 8, name)
    return Acquired(call, image, b"", fresh_s)


def test_one_grant_serves_many_and_is_kept() -> None:
    returned: list[int] = []
    grants = Grants(returned.append)
    leases = [grants.add(key("a"), acquired(1, "a"))]
    grant = grants.get(key("a"))
    assert grant is not None and grant.is_fresh and grants.get(key("a", "token")) is None
    leases += [grants.lease(grant) for _ in range(3)]
    leases.append(grants.add(key("a"), acquired(2, "a")))
    assert returned == [2], "the same image is not held twice"
    assert grants.users() == {b"a0": (1, 5)}
    for lease in leases:
        lease.release()
        lease.release()
    assert grants.users() == {b"a0": (1, 0)} and grants.held().keys() == {1}


def test_another_text_of_the_same_image_is_another_version() -> None:
    returned: list[int] = []
    grants = Grants(returned.append)
    texts = [AdapterText(b"1", template="one"), AdapterText(b"2", template="two"), None]
    for call, text in enumerate(texts):
        lease = grants.add(key("a"), replace(acquired(call, "a"), text=text))
        assert lease.text is text
        grants.add(key("a"), replace(acquired(10 + call, "a"), text=text)).release()
        lease.release()
    assert returned == [10, 0, 11, 1, 12], "the same is not held twice"


def test_a_new_version_takes_the_place_of_the_old_one() -> None:
    returned: list[int] = []
    grants = Grants(returned.append)
    old = grants.add(key("a"), acquired(1, "a", 1))
    new = grants.add(key("a"), acquired(2, "a", 2))
    assert (old.image.offset, new.image.offset) == (256, 512)
    assert grants.held().keys() == {1, 2} and returned == []
    old.release()
    assert grants.held().keys() == {2} and returned == [1]
    grants.forget("a")
    assert grants.get(key("a")) is None and returned == [1], "in use, so still held"
    new.release()
    assert len(grants) == 0 and returned == [1, 2]


def test_unload_means_one_source_and_the_callers_tenants() -> None:
    returned: list[int] = []
    grants = Grants(returned.append)
    for call, (source, tenant) in enumerate([("hub", b""), ("local", b""), ("hub", b"alice")]):
        answer = acquired(call, "a", call)
        image = replace(answer.image, source=source, tenant=tenant)
        key = (AdapterRef(("a",), source), tenant.decode())
        grants.add(key, replace(answer, image=image)).release()
    grants.forget("b")
    grants.forget("a", "s3")
    assert returned == []
    grants.forget("a", "hub", [b"", b"bob"])
    assert returned == [0]
    grants.forget("a", None, [b""])
    assert returned == [0, 1]
    grants.forget("a")
    assert returned == [0, 1, 2]


def test_where_an_adapter_was_and_what_is_idle() -> None:
    grants = Grants(lambda call: None)
    first = grants.add(key("a"), replace(acquired(1, "a"), tier="disk"))
    again = grants.add(key("a"), replace(acquired(2, "a"), tier="source"))
    grant = grants.get(key("a"))
    assert grant is not None
    assert [first.tier, again.tier, grants.lease(grant).tier] == ["disk", "source", "host"]
    assert grants.idle() == {}
    for _ in range(2):
        grants.add(key("b"), acquired(3, "b")).release()
    assert grants.idle() == {b"b0": 1}


def test_recall_takes_the_least_recently_used_that_nobody_uses() -> None:
    returned: list[int] = []
    grants = Grants(returned.append)
    leases = [grants.add(key(f"a{n}"), acquired(n, f"a{n}")) for n in range(6)]
    for lease in leases[1:]:
        lease.release()
    first = grants.get(key("a1"))
    assert first is not None
    grants.lease(first).release()
    grants.recall(SIZE + 1)
    assert returned == [2, 3]
    grants.recall(10**9)
    assert returned == [2, 3, 4, 5, 1], "and never what is in use"
    leases[0].release()
    assert returned[5:] == [0], "but that as soon as it is not"


def test_age(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: clock)
    grants = Grants(lambda call: None)
    grants.add(key("a"), acquired(1, "a", fresh_s=2.0))
    grant = grants.get(key("a"))
    assert grant is not None
    for later, fresh, outage in ((1.9, True, True), (2.1, False, True), (303.1, False, False)):
        clock = 1000.0 + later
        assert (grant.is_fresh, grant.serves_outage) == (fresh, outage)
    grants.add(key("a"), acquired(2, "a", fresh_s=1.0)).release()
    assert grant.is_fresh, "an answer makes it fresh again"


def test_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every call is given back exactly once, and not before its last lease."""
    monkeypatch.setattr(module, "MAX_IDLE", 5)
    chance = random.Random(0)
    returned: list[int] = []
    grants = Grants(returned.append)
    leases: list[GrantLease] = []
    for call in range(3000):
        name = f"a{chance.randrange(12)}"
        match chance.randrange(5):
            case 0:
                leases.append(grants.add(key(name), acquired(call, name, chance.randrange(3))))
            case 1 if (grant := grants.get(key(name))) is not None:
                leases.append(grants.lease(grant))
            case 2 if leases:
                leases.pop(chance.randrange(len(leases))).release()
            case 3 if chance.random() < 0.1:
                grants.recall(chance.randrange(5 * SIZE))
            case 4 if chance.random() < 0.1:
                (grants.forget if chance.random() < 0.5 else lambda n: grants.refused(key(n)))(name)
        assert len(returned) == len(set(returned))
        assert not grants.held().keys() & set(returned)
        assert {id(image) for image in grants.held().values()} >= {id(one.image) for one in leases}
        assert sum(users for _, users in grants.users().values()) == len(leases)
    for lease in leases:
        lease.release()
    grants.recall(10**9)
    assert len(grants) == 0
