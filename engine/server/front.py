"""The state of the HTTP front, which all routes share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

from engine.backend import Backend
from engine.config import EngineConfig
from engine.errors import LoraxError
from engine.metrics import Metrics
from engine.server.aliases import Aliases
from engine.server.bodies import Bodies
from engine.server.generation import Generator
from engine.server.keys import Keys
from engine.server.loads import Loads
from engine.server.parameters import BASE_NAMES
from engine.server.pins import Pins
from engine.server.places import Places
from engine.server.prefetches import Prefetches
from engine.server.request_reports import RequestReports
from engine.server.responses import error_response
from engine.server.text import Text


@dataclass(slots=True)
class Front:
    """The parts that routes need. `describe_error` gives status and body of an error at a path, in the format of
    that path."""

    backend: Backend
    text: Text
    config: EngineConfig
    metrics: Metrics
    bodies: Bodies
    keep_alive_s: float
    describe_error: Callable[[str, LoraxError], tuple[int, Any]]
    generator: Generator = field(init=False)
    aliases: Aliases = field(init=False)
    keys: Keys = field(init=False)
    places: Places = field(init=False)
    pins: Pins = field(init=False)
    prefetches: Prefetches = field(init=False)
    loads: Loads = field(default_factory=Loads)
    started: float = field(default_factory=time.time)
    reports: RequestReports | None = field(init=False, default=None)
    end_by: float | None = None  # by time.monotonic(), set when the server shuts down

    def __post_init__(self) -> None:
        self.keys = Keys(self.config.server)
        self.places = Places(self.config.server.max_concurrent_requests)
        names = (self.backend.info.model_id, self.config.model.model_id, *BASE_NAMES)
        self.aliases = Aliases(frozenset(names))
        self.aliases.set_all(self.config.adapters.adapter_alias)
        self.generator = Generator(self.backend, self.text, self.config, self.metrics, self.aliases)
        self.pins = Pins(self.generator, self.loads, self.text.first_token)
        self.prefetches = Prefetches(self.backend)
        if (url := self.config.server.request_logger_url) is not None:
            self.reports = RequestReports(url, self.backend.info.model_id)

    def error_response(self, path: str, error: LoraxError) -> web.Response:
        """The answer to a request for `path` that failed."""
        return error_response(*self.describe_error(path, error))


FRONT = web.AppKey("front", Front)
