"""Which source a name belongs to, and the sources that there are."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

from engine.adapters.hub import HubSource
from engine.adapters.ref import AdapterRef, SourceName, refuse_merged
from engine.adapters.sources import DemoSource, LocalSource, Source, Version
from engine.config import EngineConfig
from engine.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterLoadFailed,
    AdapterNotFound,
    InvalidRequest,
)

Ask = Callable[[AdapterRef], Awaitable[Version]]  # of a reference with a definite source

DEMO_MODEL = "demo"
DEMO_FOLDER = Path(__file__).parent.parent / "demo" / "adapters"


def make_sources(
    config: EngineConfig, max_file_bytes: int | None = None, endpoint: str | None = None
) -> dict[SourceName, Source]:
    """The sources of a server. Another source is one more entry."""
    sources: dict[SourceName, Source] = {
        "local": LocalSource(config.adapters.adapter_root),
        "hub": HubSource(
            config.model.hub_token,
            config.model.huggingface_hub_cache,
            endpoint=endpoint,
            max_file_bytes=max_file_bytes,
            max_seconds=config.adapters.adapter_load_timeout_s,
        ),
    }
    if config.model.model_id == DEMO_MODEL:
        sources["demo"] = DemoSource(DEMO_FOLDER)
    return sources


class Registry:
    """Finds the source of a reference that names none.

    In this order: names that were registered at start, the demo's adapters, folders below an adapter root, the
    default source. A reference that names its source is looked for there and nowhere else.
    """

    def __init__(self, sources: Mapping[SourceName, Source], default: SourceName) -> None:
        self.sources = sources
        self.default = default
        self._registered: dict[str, AdapterRef] = {}

    def register(self, ref: AdapterRef) -> None:
        """Makes the name of a reference with a definite source known."""
        assert ref.source is not None
        self._registered[ref.name] = ref

    def candidates(self, ref: AdapterRef) -> list[AdapterRef]:
        """The same adapter in every source where it is to be looked for, in order; at least one.

        Raises InvalidRequest for merged adapters and sources that this server does not have.
        """
        refuse_merged(ref)
        if ref.source is not None:
            if ref.source not in self.sources:
                raise InvalidRequest(
                    f"adapter_source {ref.source!r} is not available on this server",
                    field="adapter_source",
                    hint=f"use one of {', '.join(self.sources)}",
                )
            return [ref]
        if (known := self._registered.get(ref.name)) is not None:
            return [known]
        order: list[SourceName] = ["demo", "local", self.default]
        return [ref.at(name) for name in dict.fromkeys(order) if name in self.sources]

    async def resolve(self, ref: AdapterRef, ask: Ask) -> Version:
        """The version in the first source that has the adapter; `ask` puts the question to one of them.

        Raises AdapterNotFound that lists where it was looked for, or what the only source said.
        """
        candidates = self.candidates(ref)
        refusals: list[AdapterError] = []
        for candidate in candidates:
            try:
                return await ask(candidate)
            except (AdapterNotFound, AdapterForbidden, AdapterLoadFailed) as error:
                refusals.append(error)
        if len(candidates) == 1:
            raise refusals[0]
        raise self._nowhere(ref, refusals)

    def _nowhere(self, ref: AdapterRef, refusals: list[AdapterError]) -> AdapterError:
        """What was tried, in order. The last source's failure counts, and a path or repository that was closed to
        the caller.

        The hub answers a stranger's plain name with 401 whether there is such an adapter or not: that is "not found".
        """
        tried = [f"no preloaded adapter of that name ({', '.join(self._registered) or 'none'})"]
        tried += [error.message for error in refusals]
        hints = dict.fromkeys(error.hint for error in refusals if error.hint)
        kind: type[AdapterError] = AdapterNotFound
        if isinstance(refusals[-1], AdapterLoadFailed):
            kind = AdapterLoadFailed
        elif "/" in ref.id and any(isinstance(error, AdapterForbidden) for error in refusals):
            kind = AdapterForbidden
        return kind(
            f"adapter {ref.name!r} was not found: {'; '.join(tried)}",
            field="adapter_id",
            hint="; or ".join(hints),
        )
