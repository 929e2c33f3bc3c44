"""LoRAX's own API: the response format of /generate and its variants; tokens, health, facts and metrics in `routes`."""

from __future__ import annotations

from functools import partial

from engine.server.formats import Format
from engine.server.native.format import error_body
from engine.server.native.parse import parse
from engine.server.native.schemas import GenerateBody

__all__ = ["GENERATE", "GENERATE_STREAM", "INVOCATIONS", "error_body"]

GENERATE = Format(partial(parse, stream=False), GenerateBody, error_body)
GENERATE_STREAM = Format(partial(parse, stream=True), GenerateBody, error_body)
INVOCATIONS = Format(partial(parse, stream=None), GenerateBody, error_body)
