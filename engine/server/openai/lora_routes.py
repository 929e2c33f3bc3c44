"""vLLM's routes for adapters: a name for an adapter, loaded first. Answers have vLLM's texts and shapes."""

from __future__ import annotations

from contextlib import suppress

from aiohttp import web

from engine.adapters.ref import AdapterRef
from engine.errors import AdapterNotFound, InvalidRequest
from engine.server.access import check_admin, context_of, seen_by
from engine.server.aliases import Alias
from engine.server.decoding import decode
from engine.server.front import FRONT, Front
from engine.server.openai.schemas import LoadLoraBody, UnloadLoraBody
from engine.server.responses import json_response
from engine.server.unload import unload

LOCAL = ("/", "./", "../", "~")  # beginnings of a path


async def load_lora_adapter(request: web.Request) -> web.StreamResponse:
    """POST /v1/load_lora_adapter: loads `lora_path`, then `lora_name` is an alias for it."""
    check_admin(request)
    front = request.app[FRONT]
    async with front.bodies.read(request) as raw:
        body = decode(raw, LoadLoraBody)
    name, path = body.lora_name, body.lora_path
    if not name or not path:
        return _refused(400, "Both 'lora_name' and 'lora_path' must be provided.")
    try:
        target = AdapterRef.parse(path, "local" if path.startswith(LOCAL) else None, "lora_path")
        _check(front, body, target)
        with front.loads.admitted():
            lease = await front.backend.acquire(target, context_of(request).token(None))
            digest = lease.image.digest.hex()
            lease.release()
        _check(front, body, target)  # the name may have been taken meanwhile
        front.aliases.put(Alias(name, target, digest))
    except AdapterNotFound as error:
        text = f"Loading lora {name} failed: No adapter found for {path}"
        return _refused(404, f"{text}: {error}", "NotFoundError")
    except InvalidRequest as error:
        return _refused(400, str(error))
    return web.Response(text=f"Success: LoRA adapter '{name}' added successfully.")


async def unload_lora_adapter(request: web.Request) -> web.StreamResponse:
    """POST /v1/unload_lora_adapter: removes the alias, and unloads its adapter."""
    check_admin(request)
    front = request.app[FRONT]
    async with front.bodies.read(request) as raw:
        body = decode(raw, UnloadLoraBody)
    name = body.lora_name
    if not name:
        return _refused(400, "'lora_name' needs to be provided to unload a LoRA adapter.")
    if name not in front.aliases:
        return _refused(404, f"The lora adapter '{name}' cannot be found.", "NotFoundError")
    target = front.aliases.remove(name).target
    with suppress(AdapterNotFound):  # it left host memory and the device before
        await unload(front, target, seen_by(request))
    return web.Response(text=f"Success: LoRA adapter '{name}' removed successfully.")


def _check(front: Front, body: LoadLoraBody, target: AdapterRef) -> None:
    """Raises InvalidRequest if the name cannot stand for the adapter."""
    if not body.load_inplace and body.lora_name in front.aliases:
        raise InvalidRequest(
            f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in place, "
            "set 'load_inplace' to True."
        )
    front.aliases.check(body.lora_name, target)


def _refused(status: int, message: str, kind: str = "InvalidUserInput") -> web.Response:
    error = {"message": message, "type": kind, "param": None, "code": status}
    return json_response({"error": error}, status=status)


def routes() -> list[web.RouteDef]:
    return [
        web.post("/v1/load_lora_adapter", load_lora_adapter),
        web.post("/v1/unload_lora_adapter", unload_lora_adapter),
    ]
