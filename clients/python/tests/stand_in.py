"""A server that manages adapters, and nothing else: the routes and shapes of docs/api.md, and a record of requests."""

from __future__ import annotations

from typing import Any

from aiohttp import web

ADMIN = "the server's key"


class StandIn:
    """Knows the adapters `pirate` and `org/math`, which only the token `t-1` opens."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, str, Any]] = []  # method, path with query, body
        self.loaded: dict[str, dict[str, Any]] = {}
        self.aliases: dict[str, dict[str, Any]] = {}

    def app(self) -> web.Application:
        app = web.Application(middlewares=[self._record])
        app.add_routes(
            [
                web.get("/adapters/aliases", self._list_aliases),
                web.put("/adapters/aliases/{name:.+}", self._put_alias),
                web.get("/adapters/aliases/{name:.+}", self._get_alias),
                web.delete("/adapters/aliases/{name:.+}", self._delete_alias),
                web.get("/adapters", self._list),
                web.post("/adapters/load", self._load),
                web.post("/adapters/prefetch", self._prefetch),
                web.post("/adapters/pin", self._pin),
                web.post("/adapters/unload", self._unload),
                web.get("/adapters/{id:.+}", self._get),
            ]
        )
        return app

    @web.middleware
    async def _record(self, request: web.Request, handler: Any) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.requests.append((request.method, request.raw_path, body))
        if request.method != "GET" and request.headers.get("Authorization") != f"Bearer {ADMIN}":
            body = {"error": "this needs an admin's key", "error_type": "forbidden"}
            return web.json_response(body, status=403)
        try:
            found = await handler(request)
        except KeyError as error:
            body = {"error": f"no adapter {error}", "error_type": "adapter_not_found"}
            return web.json_response(body, status=404)
        return found if isinstance(found, web.Response) else web.json_response(found)

    def _entry(self, id: str) -> dict[str, Any]:
        return self.loaded.setdefault(
            id,
            {
                "id": id,
                "source": "hub",
                "state": "ready",
                "tier": "host",
                "pinned": False,
                "ranks": [8],
            },
        )

    async def _list(self, request: web.Request) -> Any:
        seen = [
            one
            for one in self.loaded.values()
            if one["id"] == "pirate" or request.headers.get("x-adapter-token") == "t-1"
        ]
        return {"adapters": seen, "total": len(seen)}

    async def _get(self, request: web.Request) -> Any:
        return self.loaded[request.match_info["id"]]

    async def _load(self, request: web.Request) -> Any:
        return self._entry((await request.json())["adapter_id"])

    async def _prefetch(self, request: web.Request) -> Any:
        return web.json_response({"id": (await request.json())["adapter_id"]}, status=202)

    async def _pin(self, request: web.Request) -> Any:
        pinned = (await request.json())["pinned"]
        entry = self._entry((await request.json())["adapter_id"])
        return entry | {"pinned": pinned, "tier": "device" if pinned else "host"}

    async def _unload(self, request: web.Request) -> Any:
        id = self.loaded.pop((await request.json())["adapter_id"])["id"]
        return {"id": id, "unloaded": ["d1"]}

    async def _list_aliases(self, request: web.Request) -> Any:
        return {"aliases": list(self.aliases.values())}

    async def _put_alias(self, request: web.Request) -> Any:
        name, body = request.match_info["name"], (await request.json())
        before = self.aliases.get(name)
        made = {
            "name": name,
            "adapter_id": body["adapter_id"],
            "adapter_source": body.get("adapter_source"),
            "digest": "d1",
        }
        self.aliases[name] = made
        return web.json_response(made | {"previous": before}, status=200 if before else 201)

    async def _get_alias(self, request: web.Request) -> Any:
        return self.aliases[request.match_info["name"]]

    async def _delete_alias(self, request: web.Request) -> Any:
        return self.aliases.pop(request.match_info["name"])
