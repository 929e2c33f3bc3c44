"""One tenant against another on a whole server: a private adapter, another's requests, the server's own files.

The victim has loaded `org/private` with the token alice. Every attack is refused, and no answer tells the attacker of
it, a token, a key or a folder.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from engine.adapters.exchange import Exchange
from engine.adapters.hub import HubSource
from engine.adapters.registry import make_sources
from engine.adapters.tiers import HostRegion
from engine.config import EngineConfig, ServerConfig
from engine.ops.layout import ShardLayout
from engine.process import Parts
from tests.adapters.fake_hub import FakeHub, Repo
from tests.server.whole import Whole, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")

HUB = "LORAX_TEST_HUB"
TTL_S = 0.2
VICTIM, ATTACKER, ADMIN = "sk-victim-0123", "sk-attacker-0123", "sk-admin-0123"
KEYS = f"""
- {{name: victim, key: {VICTIM}}}
- {{name: attacker, key: {ATTACKER}, priority: 2}}
- {{name: admin, key: {ADMIN}, admin: true}}
"""
PROMPT = "word5 word6 word7 word8 " * 12
ROUTES = ("/info", "/metrics", "/v1/models", "/adapters", "/cache", "/adapters/aliases")


def impatient_exchange(
    config: EngineConfig, layout: ShardLayout, region: HostRegion, **more: Any
) -> Exchange:
    """Asks the fake hub again after TTL_S. Runs in the exchange's process."""
    sources = make_sources(config)
    cache = Path(config.model.huggingface_hub_cache or "")
    sources["hub"] = HubSource(None, cache, endpoint=os.environ[HUB], ttl_s=TTL_S)
    return Exchange(config, layout, region, sources=sources, **more)


@dataclass
class Scene:
    server: Whole
    hub: FakeHub
    folder: Path

    async def ask(
        self,
        path: str,
        body: Any = None,
        key: str | None = ATTACKER,
        token: str | None = None,
        method: str = "",
        **headers: str,
    ) -> tuple[int, str]:
        """Status and text of an answer."""
        sent = dict(headers)
        if key:
            sent["Authorization"] = f"Bearer {key}"
        if token:
            sent["x-adapter-token"] = token
        method = method or ("GET" if body is None else "POST")
        async with self.server.session.request(method, path, json=body, headers=sent) as response:
            return response.status, await response.text()

    async def generate(
        self,
        adapter: str | None,
        key: str | None = ATTACKER,
        token: str | None = None,
        **parameters: Any,
    ) -> tuple[int, str]:
        given: dict[str, Any] = {"max_new_tokens": 2, "details": True} | parameters
        if adapter is not None:
            given["adapter_id"] = adapter
        if adapter == "public":
            given["adapter_source"] = "local"
        return await self.ask(
            "/generate", {"inputs": PROMPT, "parameters": given}, key=key, token=token
        )

    async def cached(self, adapter: str | None, key: str, token: str | None = None) -> int:
        """Prompt tokens that the request found in the prefix cache."""
        body = {"prompt": PROMPT, "max_tokens": 1, "model": adapter or "base"}
        if adapter == "public":
            body["adapter_source"] = "local"
        status, text = await self.ask("/v1/completions", body, key=key, token=token)
        assert status == 200, text
        return int(json.loads(text)["usage"]["prompt_tokens_details"]["cached_tokens"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def scene(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Scene]:
    folder = tmp_path_factory.mktemp("attacks")
    keys = folder / "keys.yaml"
    keys.write_text(KEYS)
    with FakeHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setenv(HUB, hub.url)
        given = ServerConfig(api_keys_file=str(keys), prefix_cache_per_tenant=True)
        parts = Parts(exchange="tests.server.test_attacks:impatient_exchange")
        async with serving(folder, parts, server=given, default_adapter_source="hub") as server:
            made = server.write("public", 1)
            for name, readers in (("private", {"alice"}), ("shared", {"alice", "bob"})):
                repo = Repo(private=True, readers=set(readers))
                repo.commit({one.name: one.read_bytes() for one in made.iterdir()})
                hub.repos[f"org/{name}"] = repo
            outside = folder / "outside"
            made.rename(outside)
            (folder / "adapters" / "link").symlink_to(outside)
            server.write("public", 1)
            scene = Scene(server, hub, folder)
            status, text = await scene.generate("org/private", VICTIM, "alice")
            assert status == 200, text
            yield scene


def refused(answer: tuple[int, str], *statuses: int) -> None:
    status, text = answer
    assert status in (statuses or (400, 401, 403, 404, 409, 422, 424)), (status, text)
    for secret in ("alice", VICTIM, ADMIN, ATTACKER):
        assert secret not in text, text


Attack = Callable[[Scene], Awaitable[None]]
ATTACKS: dict[str, Attack] = {}


def attack(name: str) -> Callable[[Attack], Attack]:
    def add(run: Attack) -> Attack:
        ATTACKS[name] = run
        return run

    return add


def tokens_attack(name: str, token: str | None, adapter: str = "org/private") -> None:
    async def run(scene: Scene) -> None:
        refused(await scene.generate(adapter, token=token))
        in_body = {"api_token": token} if token else {}
        refused(await scene.generate(adapter, **in_body))
        body = {"prompt": "word1", "model": adapter, "adapter_source": "hub"} | in_body
        refused(await scene.ask("/v1/completions", body, token=token))

    ATTACKS[name] = run


tokens_attack("no token", None)
tokens_attack("another's token", "bob")
tokens_attack("an unknown token", "nonsense")
tokens_attack("the own key as token", ATTACKER)
tokens_attack("by its commit", "bob", "org/private@main")
tokens_attack("by another spelling", "bob", "ORG/Private")
tokens_attack("through a dot", "bob", "org/./private")
for path in (
    "../outside",
    "link",
    "/etc",
    "~root/x",
    "a/../../outside",
    "file:///etc",
    "%2e%2e/outside",
):

    def path_attack(path: str = path) -> None:
        async def run(scene: Scene) -> None:
            answer = await scene.generate(path, adapter_source="local")
            refused(answer)
            assert str(scene.folder) not in answer[1]
            refused(await scene.generate(path))

        ATTACKS[f"the path {path}"] = run

    path_attack()


@attack("without a key")
async def _(scene: Scene) -> None:
    for key in (None, "sk-wrong"):
        refused(await scene.generate("public", key=key), 401)
        for path in ROUTES:
            refused(await scene.ask(path, key=key), 401)


@attack("an alias of the private adapter")
async def _(scene: Scene) -> None:
    body = {"adapter_id": "org/private", "adapter_source": "hub"}
    refused(await scene.ask("/adapters/aliases/mine", body, method="PUT"), 403)
    refused(await scene.ask("/adapters/aliases/mine", body, key=ADMIN, method="PUT"))
    own = body | {"api_token": "alice"}
    status, text = await scene.ask("/adapters/aliases/theirs", own, key=ADMIN, method="PUT")
    assert status == 201, text
    refused(await scene.generate("theirs"))
    refused(await scene.generate("theirs", token="bob"))
    await scene.ask("/adapters/aliases/theirs", key=ADMIN, method="DELETE")


@attack("merged with a forbidden one")
async def _(scene: Scene) -> None:
    merged = {"ids": ["org/shared", "org/private"], "weights": [1, 0.01]}
    refused(await scene.generate(None, token="bob", merged_adapters=merged))
    body = {"prompt": "word1", "merged_adapters": merged}
    refused(await scene.ask("/v1/completions", body, token="bob"))


@attack("the names in lists and metrics")
async def _(scene: Scene) -> None:
    for path in ROUTES:
        for token in (None, "bob"):
            status, text = await scene.ask(path, token=token)
            assert status == 200 and "org/private" not in text and "alice" not in text, path
    for path in ("/v1/models/org/private", "/adapters/org/private"):
        refused(await scene.ask(path, token="bob"), 404)


@attack("whether it exists")
async def _(scene: Scene) -> None:
    """The answer for a private adapter is that for one that does not exist."""
    there = await scene.generate("org/private", token="bob")
    nowhere = await scene.generate("org/nothing", token="bob")
    assert there[0] == nowhere[0]
    assert there[1].replace("org/private", "org/nothing") == nowhere[1]


@attack("management without rights")
async def _(scene: Scene) -> None:
    for route in ("load", "pin", "unload"):
        body = {"adapter_id": "org/private", "adapter_source": "hub"}
        refused(await scene.ask(f"/adapters/{route}", body, token="alice"), 403)
        refused(await scene.ask(f"/adapters/{route}", body, key=ADMIN, token="bob"))
    refused(
        await scene.ask("/v1/load_lora_adapter", {"lora_name": "x", "lora_path": "org/shared"}), 403
    )
    refused(await scene.ask("/v1/unload_lora_adapter", {"lora_name": "public"}), 403)
    status, text = await scene.generate("org/private", VICTIM, "alice")
    assert status == 200, text


@attack("another's prompts in the prefix cache")
async def _(scene: Scene) -> None:
    for adapter, token in ((None, None), ("public", None), ("org/shared", "alice")):
        await scene.cached(adapter, VICTIM, token)
        assert await scene.cached(adapter, VICTIM, token) > 0, "the cache works"
        theirs = "bob" if token else None
        assert await scene.cached(adapter, ATTACKER, theirs) == 0


@attack("keys sent to the hub")
async def _(scene: Scene) -> None:
    await scene.generate("org/shared", token="bob")
    await scene.generate("org/nothing")
    seen = scene.hub.tokens_seen
    assert "bob" in seen and not seen & {VICTIM, ATTACKER, ADMIN}


@attack("a page of another origin")
async def _(scene: Scene) -> None:
    for path in ("/generate", "/v1/completions", "/adapters/unload", "/adapters/aliases/x"):
        answer = await scene.ask(path, {}, key=ADMIN, Origin="https://evil.example")
        refused(answer, 403)


@attack("a higher priority than the tenant's")
async def _(scene: Scene) -> None:
    refused(await scene.generate("public", priority=3), 422)


@attack("a token with control characters")
async def _(scene: Scene) -> None:
    answer = await scene.generate("org/private", api_token="al\nice\x1b[31m")
    refused(answer, 422)
    assert "\x1b" not in answer[1]


@attack("a source that is off")
async def _(scene: Scene) -> None:
    refused(await scene.generate("https://127.0.0.1/x"))
    refused(await scene.generate("gs://bucket/x"))
    refused(await scene.generate("x", adapter_source="https"))


@pytest.mark.parametrize("name", ATTACKS)
async def test_is_refused(scene: Scene, caplog: pytest.LogCaptureFixture, name: str) -> None:
    caplog.set_level(logging.DEBUG, "engine")
    await ATTACKS[name](scene)
    for secret in ("alice", VICTIM, ATTACKER, ADMIN):
        assert secret not in caplog.text


async def test_a_revoked_token(scene: Scene) -> None:
    """Refused once its time is over, although the adapter is loaded; running requests are not concerned."""
    scene.hub.repos["org/private"].readers.clear()
    async with asyncio.timeout(30):
        while True:
            status, text = await scene.generate("org/private", VICTIM, "alice")
            if status != 200:
                break
            await asyncio.sleep(TTL_S / 4)
    refused((status, text))
    refused(await scene.generate("org/private", VICTIM, "alice"))


async def test_there_are_enough() -> None:
    assert len(ATTACKS) >= 25
