"""Who may use the server: keys, tokens, pages of other origins, and who shares cached prompts."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from aiohttp import hdrs
from aiohttp.test_utils import TestClient

from engine.adapters.hub import HubSource
from engine.adapters.ref import AdapterRef
from engine.config import EngineConfig, ServerConfig
from engine.errors import ConfigError
from engine.messages import TenantRef
from engine.server import keys
from engine.server.app import build_app
from engine.server.keys import Tenant
from engine.server.routes import FORMATS, routes
from engine.server.salts import salt_of
from engine.server.text import Text
from tests.adapters.fake_hub import FakeHub, Repo
from tests.server.fake import FakeBackend, FakeLease, Json, Start, events_of

KEY, OTHER = "sk-right-0123456789", "sk-other-0123456789"
BEARER = {"Authorization": f"Bearer {KEY}"}
KEYED: dict[str, object] = {"api_key": (KEY,)}
# Bytes of every route's body; each route ignores the fields of the others.
BODY: Json = {
    "inputs": "x",
    "prompt": "x",
    "input": "x",
    "messages": [{"role": "user", "content": "x"}],
    "adapter_id": "org/a",
    "model": "org/a",
    "lora_name": "lora",
    "lora_path": "org/a",
    "tokens": [5],
    "load_inplace": True,
    "max_tokens": 1,
    "parameters": {"adapter_id": "org/a", "max_new_tokens": 1},
}
FREE = [("GET", "/health"), ("GET", "/ping"), ("GET", "/")]
EVERY = [(one.method, one.path.partition("{")[0] + "x" * ("{" in one.path)) for one in routes()]
GENERATES = list(FORMATS)
NO_ROUTES = [("GET", "/nowhere"), ("GET", "/health/"), ("POST", "/health"), ("OPTIONS", "/info")]


def fitting(path: str, body: Json) -> Json:
    """`body` without `prompt` where that means something else."""
    return body if path != "/v1/responses" else {k: v for k, v in body.items() if k != "prompt"}


async def ask(
    client: TestClient, method: str, path: str, headers: dict[str, str] | None = None
) -> tuple[int, Any, str]:
    """Status, headers and text of an answer."""
    sent = {"json": fitting(path, BODY)} if method in ("POST", "PUT") else {}
    async with client.request(method, path, headers=headers or {}, **sent) as response:
        return response.status, response.headers, await response.text()


# -- keys

REFUSED: dict[str, dict[str, str]] = {
    "none": {},
    "unknown": {"Authorization": f"Bearer {OTHER}"},
    "a part": {"Authorization": f"Bearer {KEY[:-1]}"},
    "more": {"Authorization": f"Bearer {KEY}x"},
    "another case": {"Authorization": f"Bearer {KEY.upper()}"},
    "no scheme": {"Authorization": KEY},
    "another scheme": {"Authorization": f"Basic {KEY}"},
    "beyond ASCII": {"Authorization": "Bearer caf\xe9"},
    "unknown x-api-key": {"x-api-key": OTHER},
    "a scheme in x-api-key": {"x-api-key": f"Bearer {KEY}"},
    "the header of tokens": {"x-adapter-token": KEY},
    "a cookie": {"Cookie": f"api_key={KEY}; Authorization={KEY}"},
}


@pytest.mark.parametrize("headers", REFUSED.values(), ids=REFUSED)
async def test_refused_on_every_route(
    start: Start, backend: FakeBackend, caplog: pytest.LogCaptureFixture, headers: dict[str, str]
) -> None:
    caplog.set_level(logging.DEBUG, "engine")
    client = await start(KEYED)
    for method, path in [*EVERY, *NO_ROUTES]:
        if (method, path) in FREE:
            continue
        status, answered, text = await ask(client, method, path, headers)
        assert (status, answered["WWW-Authenticate"]) == (401, "Bearer"), (method, path)
        error = json.loads(text)
        if path.startswith("/v1/messages"):
            assert error["error"]["type"] == "authentication_error"
        elif path.startswith("/v1/"):
            assert error["error"]["code"] == "unauthorized"
        else:
            assert error["error_type"] == "unauthorized"
        assert KEY not in text and OTHER not in text
    for path in GENERATES:  # a key in the body is no key
        response = await client.post(
            path, json=fitting(path, BODY) | {"api_token": KEY}, headers=headers
        )
        assert response.status == 401
    assert not backend.acquired and not backend.requests
    assert KEY not in caplog.text and OTHER not in caplog.text


async def test_a_key_serves_on_every_route(start: Start) -> None:
    """As on a server without keys, in either header; and health needs none."""
    without, client = await start(), await start(KEYED)
    found = [
        [(await ask(server, method, path, headers))[0] for method, path in [*EVERY, *NO_ROUTES]]
        for server, headers in (
            (without, {}),
            (client, BEARER),
            (client, {"Authorization": f"bearer  {KEY} "}),
            (client, {"x-api-key": KEY}),
            (client, {"x-api-key": KEY, "Authorization": f"Bearer {OTHER}"}),
        )
    ]
    assert found[1:] == [found[0]] * 4
    missing = 7  # the alias, the adapter and the model of that name; four routes of encoders
    assert sum(status in (200, 201, 202) for status in found[0]) == len(EVERY) - missing
    for method, path in FREE:
        assert (await ask(client, method, path))[0] == 200
    assert (await client.head("/health")).status == 200


async def test_what_a_server_with_keys_tells(start: Start, backend: FakeBackend) -> None:
    client = await start(KEYED)
    texts = [(await ask(client, "GET", path, BEARER))[2] for path in ("/info", "/metrics")]
    assert all(texts) and not any(KEY in text for text in texts)


async def test_the_key_is_not_a_token(start: Start, backend: FakeBackend) -> None:
    client = await start({"api_key": (KEY, OTHER)})
    tokens: list[tuple[dict[str, str], str | None, str | None]] = [
        (BEARER, None, None),
        ({"x-api-key": KEY}, None, None),
        ({"x-api-key": KEY, "Authorization": "Bearer a-token"}, None, None),
        ({"x-api-key": OTHER} | BEARER, None, None),
        (BEARER | {"x-adapter-token": "mine"}, None, "mine"),
        (BEARER | {"x-adapter-token": "EMPTY"}, None, None),
        (BEARER | {"x-adapter-token": "mine"}, "of the body", "of the body"),
        (BEARER, "of the body", "of the body"),
    ]
    for headers, in_body, expected in tokens:
        given = {} if in_body is None else {"api_token": in_body}
        body = BODY | given | {"parameters": BODY["parameters"] | given}
        for path in GENERATES:
            await (await client.post(path, json=fitting(path, body), headers=headers)).read()
        await client.put("/adapters/aliases/prod", json=body, headers=headers)
        assert {token for _, token in backend.acquired} == {expected}, headers
        assert len(backend.acquired) == len(GENERATES) + 1
        backend.acquired.clear()


async def test_a_key_in_the_place_of_a_token(start: Start, backend: FakeBackend) -> None:
    """Is refused before a source could see it, also another's key."""
    client = await start({"api_key": (KEY, OTHER)})
    for given, headers, field in (
        ({"api_token": OTHER}, BEARER, "api_token"),
        ({}, BEARER | {"x-adapter-token": f" {KEY} "}, "x-adapter-token"),
    ):
        body = BODY | given | {"parameters": BODY["parameters"] | given}
        answers = [
            await client.post(path, json=fitting(path, body), headers=headers) for path in GENERATES
        ]
        answers.append(await client.put("/adapters/aliases/prod", json=body, headers=headers))
        for answer in answers:
            text = await answer.text()
            refused = 400 if answer.url.path.startswith("/v1/") else 422
            assert (answer.status, f'"{field}"' in text) == (refused, True), text
            assert KEY not in text and OTHER not in text
    assert not backend.acquired


async def test_tokens_without_keys(client: TestClient, backend: FakeBackend) -> None:
    """The bearer's, as in LoRAX; the header for tokens goes before it."""
    bad = {"x-adapter-token": "caf\xe9"}
    for headers, expected in (
        ({"Authorization": "Bearer a"}, "a"),
        ({"Authorization": "Bearer a", "x-adapter-token": "b"}, "b"),
        ({"x-adapter-token": "b", "x-api-key": "c"}, "b"),
        ({"x-api-key": "c"}, None),
    ):
        await ask(client, "POST", "/generate", headers)
        assert backend.acquired.pop()[1] == expected
    status, _, text = await ask(client, "POST", "/generate", bad)
    assert (status, json.loads(text)["field"]) == (422, "x-adapter-token")


async def test_loads_are_for_the_tenant(start: Start, backend: FakeBackend) -> None:
    """The exchange learns whose request it is; without server keys all are the same."""
    for fields, headers, tenant in ((KEYED, BEARER, "default"), ({}, BEARER, "")):
        client = await start(fields)
        for path in GENERATES:
            assert (await ask(client, "POST", path, headers))[0] == 200
        alias = {"adapter_id": "org/a"}
        response = await client.put("/adapters/aliases/prod", json=alias, headers=headers)
        assert response.status in (200, 201)
        assert [one.name for one in backend.tenants] == [tenant] * (len(GENERATES) + 1)
        backend.tenants.clear()


async def test_the_hub_never_sees_the_key(
    start: Start, backend: FakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With server keys. Without them a gateway's key is sent, and does not matter for a public adapter."""
    acquire = backend.acquire

    async def from_hub(ref: AdapterRef, token: str | None, tenant: TenantRef) -> FakeLease:
        version = await asyncio.to_thread(source.resolve, ref, token)
        fetched = await asyncio.to_thread(source.fetch, version, token, lambda *at: None)
        fetched.close()
        return await acquire(ref, token, tenant)

    monkeypatch.setattr(backend, "acquire", from_hub)
    with FakeHub() as hub:
        hub.repos["org/a"] = repo = Repo()
        repo.commit({"adapter_config.json": b"{}", "adapter_model.safetensors": b"weights"})
        source = HubSource(None, tmp_path, endpoint=hub.url, attempts=1)
        client = await start(KEYED)
        for headers in (BEARER, {"x-api-key": KEY}, BEARER | {"x-adapter-token": "alice"}):
            for path in GENERATES:
                assert (await ask(client, "POST", path, headers))[0] == 200
        assert hub.tokens_seen == {"", "alice"}
        source._cache = str(tmp_path / "again")
        status, _, text = await ask(await start(), "POST", "/generate", BEARER)
        assert status == 200, text
        assert hub.tokens_seen == {"", "alice", KEY}


# -- the file of keys


def rewrite(file: Path, text: str) -> None:
    """At once, as editors do it: the server never reads half of it."""
    fresh = file.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(file)


async def until_status(client: TestClient, key: str, status: int) -> None:
    async with asyncio.timeout(60):
        while (await client.get("/info", headers={"x-api-key": key})).status != status:
            await asyncio.sleep(0.01)


async def test_a_file_that_changes(
    start: Start,
    backend: FakeBackend,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A revoked key is refused, but for what runs; what cannot be read changes nothing."""
    monkeypatch.setattr(keys, "POLL_S", 0.01)
    file = tmp_path / "keys.yaml"
    rewrite(file, f"- {{name: a, key: {KEY}}}\n")
    client = await start({"api_keys_file": str(file)})
    assert (await client.get("/info", headers=BEARER)).status == 200
    backend.say("one two")
    backend.gate = asyncio.Event()
    streaming = asyncio.create_task(client.post("/generate_stream", json=BODY, headers=BEARER))
    async with asyncio.timeout(60):
        while not backend.open:
            await asyncio.sleep(0.005)
    rewrite(file, f"- {{name: a, key: {OTHER}}}\n")
    try:
        await until_status(client, OTHER, 200)
        assert (await client.get("/info", headers=BEARER)).status == 401
    finally:
        backend.gate.set()
    events = events_of(await (await streaming).read())
    assert json.loads(events[-1])["generated_text"]
    for broken in (f"- {{name: a, key: {KEY}", "", f"- {KEY}", None):
        caplog.clear()
        file.unlink() if broken is None else rewrite(file, broken)
        async with asyncio.timeout(60):
            while "stay valid" not in caplog.text:
                await asyncio.sleep(0.01)
        assert KEY not in caplog.text and OTHER not in caplog.text
        assert (await client.get("/info", headers={"x-api-key": OTHER})).status == 200
    await asyncio.sleep(0.1)
    assert caplog.text.count("stay valid") == 1, "a missing file is logged once"
    rewrite(file, "[]")
    await until_status(client, OTHER, 401)
    rewrite(file, f"- {{name: a, key: {KEY}}}\n- {{name: a, key: {OTHER}}}")
    await until_status(client, KEY, 200)
    assert (await client.get("/info", headers={"x-api-key": OTHER})).status == 200


# -- pages of other origins


@pytest.mark.parametrize(
    ("allowed", "origin", "may"),
    [
        ((), "http://a", None),
        ((), "null", None),
        (("http://a", "http://b"), "http://b", "http://b"),
        (("http://a",), "http://c", None),
        (("http://a",), "http://a.evil", None),
        (("http://a",), "https://a", None),
        (("*",), "http://a", "*"),
    ],
)
@pytest.mark.parametrize("keyed", [False, True])
async def test_pages(
    start: Start, allowed: tuple[str, ...], origin: str, may: str | None, keyed: bool
) -> None:
    """A page that may not gets no answer that it can read, and nothing is done for it."""
    client = await start({"cors_allow_origin": allowed} | (KEYED if keyed else {}))
    headers = {"Origin": origin} | BEARER
    asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
    answers = [
        await client.options("/v1/chat/completions", headers=asked),
        await client.get("/info", headers=headers),
        await client.post("/generate_stream", json={"inputs": "x"}, headers=headers),
        await client.post("/generate", json={}, headers=headers),
        await client.delete("/adapters/aliases/x", headers=headers),
    ]
    expected = [204, 200, 200, 422, 404] if may else [403, 200, 403, 403, 403]
    assert [answer.status for answer in answers] == expected
    assert [one.headers.get("Access-Control-Allow-Origin") for one in answers] == [may] * 5
    vary = "Origin" if allowed and "*" not in allowed else None
    assert {answer.headers.get("Vary") for answer in answers} == {vary}
    if may:
        assert "POST" in answers[0].headers["Access-Control-Allow-Methods"]
    else:
        assert (await answers[3].json())["error_type"] == "origin_forbidden"
    await answers[2].read()


async def test_a_page_without_a_key(start: Start) -> None:
    """It may read why it is refused."""
    client = await start({"cors_allow_origin": ("http://a",)} | KEYED)
    response = await client.post("/generate", json=BODY, headers={"Origin": "http://a"})
    assert response.status == 401
    assert response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] == "http://a"


@pytest.mark.parametrize("origin", ["http://a/", "a", "http://a/b", "HTTP://a", "http://a, b", ""])
def test_origins_that_no_browser_sends(backend: FakeBackend, text: Text, origin: str) -> None:
    with pytest.raises(ConfigError, match="--cors-allow-origin"):
        build_app(backend, text, EngineConfig(server=ServerConfig(cors_allow_origin=(origin,))))


# -- shared prompts


@pytest.mark.parametrize("per_tenant", [False, True])
async def test_who_shares_prompts(
    start: Start, backend: FakeBackend, tmp_path: Path, per_tenant: bool
) -> None:
    """Requests of the same adapter and salt, and with the flag of the same tenant. On all kinds of routes alike."""
    file = tmp_path / "keys.yaml"
    file.write_text("[{name: a, key: a1}, {name: a, key: a2}, {name: b, key: b1}]")
    client = await start({"api_keys_file": str(file), "prefix_cache_per_tenant": per_tenant})
    found: dict[tuple[Any, ...], set[bytes]] = {}
    salts = (None, "x", "y", "a", "b")
    for key, salt, adapter in itertools.product(("a1", "a2", "b1"), salts, ("base", "org/a")):
        given = {} if salt is None else {"cache_salt": salt}
        who = (key[0] if per_tenant else None, salt, adapter)
        for path in ("/generate", "/v1/completions", "/v1/chat/completions"):
            body = BODY | given | {"model": adapter, "adapter_id": adapter}
            body["parameters"] = BODY["parameters"] | given | {"adapter_id": adapter}
            response = await client.post(path, json=body, headers={"x-api-key": key})
            assert response.status == 200, await response.text()
            found.setdefault(who, set()).add(backend.requests[-1].cache_salt)
    assert all(len(one) == 1 for one in found.values())
    assert len(set.union(*found.values())) == len(found) == 10 * (1 + per_tenant)
    if (
        not per_tenant
    ):  # the base's prompts are shared by default, a private adapter's have its lease's salt
        assert found[None, None, "base"] == {b""} and found[None, None, "org/a"] == {b"salt"}


def test_parts_of_a_salt_are_told_apart() -> None:
    """The same characters, divided otherwise, are another salt. Without a wish the lease's salt stays."""
    a, b, ab = Tenant("a"), Tenant("b"), Tenant("ab")
    parts: list[tuple[bytes, str | None, Tenant | None]] = [
        (b"", "ab", None),
        (b"", None, ab),
        (b"", "a", b),
        (b"", "", ab),
        (b"a", "b", None),
        (b"a", None, b),
        (b"ab", "", None),
        (b"", "b", a),
    ]
    assert len({salt_of(*one) for one in parts}) == len(parts)
    assert salt_of(b"lease", None, None) == b"lease"
    assert salt_of(b"", "a", Tenant("b", 1, 2.0)) == salt_of(b"", "a", b), "by name"
