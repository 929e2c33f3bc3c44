"""LoRAX's routes that do not generate for a client: health, facts and metrics."""

from __future__ import annotations

from aiohttp import web

import engine
from engine.errors import EngineDead
from engine.messages import TierStats
from engine.metrics import CONTENT_TYPE
from engine.server.front import FRONT
from engine.server.parameters import Parameters
from engine.server.refusals import refused
from engine.server.responses import json_response

ENCODERS = ("/embed", "/classify", "/classify_batch", "/v1/embeddings")


async def health(request: web.Request) -> web.StreamResponse:
    """GET /health, /ping and /: 503 when the engine is gone. While no adapter can be loaded the status is still 200,
    because the base model and adapters in use are served."""
    backend = request.app[FRONT].backend
    if not backend.alive:
        return json_response({"error": "unhealthy", "error_type": "healthcheck"}, status=503)
    if backend.exchange_away:
        return json_response({"status": "degraded", "adapter_exchange": "restarting"})
    return web.Response(text="")


async def startup(request: web.Request) -> web.StreamResponse:
    """GET /startup: 200 once the engine has generated a token."""
    front = request.app[FRONT]
    if not front.backend.alive:
        raise EngineDead("the engine is gone", hint="restart the server")
    parameters = Parameters(max_new_tokens=1)
    async with front.generator.open([[front.text.first_token]], parameters) as generation:
        while await generation.next() is not None:
            pass
    return web.Response(text="")


async def info(request: web.Request) -> web.StreamResponse:
    """GET /info: LoRAX's fields, then ours."""
    front = request.app[FRONT]
    about, config, stats = front.backend.info, front.config, front.backend.stats
    merged = about.merged_adapter
    lorax = {
        "model_id": about.model_id,
        "model_sha": about.revision,
        "model_dtype": about.dtype,
        "model_device_type": about.device,
        "model_pipeline_tag": "text-generation",
        "max_concurrent_requests": config.server.max_concurrent_requests,
        "max_best_of": config.server.max_best_of,
        "max_stop_sequences": config.server.max_stop_sequences,
        "max_input_length": about.max_input_length,
        "max_total_tokens": about.max_total_tokens,
        "waiting_served_ratio": 0.0,  # requests never wait for a batch to fill
        "max_batch_total_tokens": about.max_batch_total_tokens,
        "max_waiting_tokens": 0,
        "validation_workers": 1,
        "eager_prefill": True,
        "version": engine.__version__,
    }
    ours = {
        "model_type": about.model_type,
        "quantize": about.quantize,
        "merged_adapter": None
        if merged is None
        else {"name": merged.name, "source": merged.source, "revision": merged.revision},
        "device_name": about.device_name,
        "vocab_size": about.vocab_size,
        "max_batch_size": about.max_batch_size,
        "max_step_tokens": about.max_step_tokens,
        "max_num_alternatives": config.server.max_num_alternatives,
        "block_size": about.block_size,
        "adapter_bytes": about.adapter_bytes,
        "host_bytes": about.host_bytes,
        "backends": about.backends,
        "memory_plan": dict(about.memory_plan),
        "targets": about.targets,
        "chat_template": front.text.has_chat_template,
        "adapters_resident": [
            {"name": name, "digest": digest.hex(), "bytes": size}
            for name, digest, size in stats.resident
        ],
        "waiting": stats.waiting,
        "running": stats.running,
    }
    return json_response(lorax | ours)


async def metrics(request: web.Request) -> web.StreamResponse:
    """GET /metrics: Prometheus text, or JSON if the client asks for it."""
    front = request.app[FRONT]
    backend = front.backend
    adapters = await backend.adapters() if backend.alive else []
    tiers = await backend.tiers() if backend.alive else TierStats()
    as_json = request.query.get("format") == "json"
    levels = (backend.stats, adapters, backend.info.block_size, backend.exchange_restarts, tiers)
    if as_json or "application/json" in request.headers.get("Accept", ""):
        return json_response(front.metrics.render_json(*levels))
    text = front.metrics.render(*levels)
    return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE})


async def version(_: web.Request) -> web.StreamResponse:
    """GET /version."""
    return json_response({"version": engine.__version__})


async def no_encoder(_: web.Request) -> web.StreamResponse:
    """POST to the routes of models that embed or classify."""
    raise refused(
        404,
        "this model generates text; it neither embeds nor classifies",
        "use /generate or /v1/chat/completions",
    )


def routes() -> list[web.RouteDef]:
    return [
        *(web.post(path, no_encoder) for path in ENCODERS),
        web.get("/version", version),
        web.get("/", health),
        web.get("/health", health),
        web.get("/ping", health),
        web.get("/startup", startup),
        web.get("/info", info),
        web.get("/metrics", metrics),
    ]
