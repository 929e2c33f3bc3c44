"""The table of adapter sources, and the source that a name belongs to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from functools import partial

from engine.adapters.disk_cache import DiskCache
from engine.adapters.https import HttpsSource
from engine.adapters.hub import HubSource
from engine.adapters.pbase import PbaseSource
from engine.adapters.ref import AdapterRef
from engine.adapters.remote import check_rank
from engine.adapters.s3 import S3Source
from engine.adapters.schemes import SchemeSource
from engine.adapters.sources import DemoSource, LocalSource, Source, Version
from engine.checkpoint import DEMO, DEMO_FOLDER, cache_folder
from engine.config import GIB, AdapterConfig, EngineConfig, flag_of
from engine.errors import (
    AdapterError,
    AdapterForbidden,
    AdapterLoadFailed,
    AdapterNotFound,
    ConfigError,
    InvalidRequest,
)
from engine.sandbox.convert import FOLDER as CONVERTED

Ask = Callable[[AdapterRef], Awaitable[Version]]  # resolves a reference that names its source


def disk_cache(config: EngineConfig) -> DiskCache:
    """The downloaded adapters of a server, within one budget with the converted ones."""
    return DiskCache(
        cache_folder(config.model.huggingface_hub_cache),
        int(config.adapters.adapter_disk_cache_gb * GIB),
        config.adapters.adapter_load_timeout_s,
        files=CONVERTED,
    )


def make_sources(
    config: EngineConfig, max_file_bytes: int | None = None, cache: DiskCache | None = None
) -> dict[str, Source]:
    """The sources of a server, by name. A new source is one more line in this table.

    `max_file_bytes`: larger weight files are not downloaded. `cache`: of downloads; None makes one.
    """
    adapters = config.adapters
    cache = cache or disk_cache(config)
    check = partial(check_rank, max_rank=adapters.max_adapter_rank)
    s3 = S3Source(
        cache, endpoint=adapters.s3_endpoint_url, max_file_bytes=max_file_bytes, check=check
    )
    table: list[Source] = [
        LocalSource(adapters.adapter_root),
        HubSource(
            config.model.hub_token,
            config.model.huggingface_hub_cache,
            max_file_bytes=max_file_bytes,
            check=check,
            max_seconds=adapters.adapter_load_timeout_s,
        ),
        s3,
        PbaseSource(
            s3,
            adapters.predibase_gateway_endpoint,
            token=adapters.predibase_api_token,
            bucket=adapters.predibase_model_bucket,
        ),
    ]
    if adapters.adapter_hosts:
        table.append(
            HttpsSource(cache, adapters.adapter_hosts, max_file_bytes=max_file_bytes, check=check)
        )
    for scheme in adapters.adapter_schemes:
        table.append(SchemeSource(scheme, cache, max_file_bytes=max_file_bytes, check=check))
    if config.model.model_id == DEMO:
        table.insert(0, DemoSource(DEMO_FOLDER / "adapters"))
    return {source.name: source for source in table}


def selectable(sources: Mapping[str, Source]) -> list[str]:
    """The sources that a request or a setting may name."""
    return [name for name, source in sources.items() if source.selectable]


def default_source(config: AdapterConfig, sources: Mapping[str, Source]) -> str:
    """The source for requests that name none. Raises ConfigError if a setting names a source that does not exist."""
    names = selectable(sources)
    for field in ("adapter_source", "default_adapter_source"):
        name = getattr(config, field)
        if name is not None and name not in names:
            raise ConfigError(
                f"{flag_of(field)} {name!r} is not a source of this server; it has {', '.join(names)}",
                field=field,
                hint="use one of these",
            )
    return config.default_adapter_source or config.adapter_source


def check_merging(config: EngineConfig) -> str:
    """The adapter to merge into the base model. Raises ConfigError if other settings contradict that."""
    adapters = config.adapters
    if adapters.adapter_id is None:
        raise _not_merging("needs an adapter", "set --adapter-id")
    for name in ("preloaded_adapter_ids", "adapter_alias"):
        if getattr(adapters, name):
            raise _not_merging(
                f"serves no other adapter, but {flag_of(name)} is set", "leave one of the two out"
            )
    if config.model.load_format == "dummy":
        raise _not_merging(
            "needs the weights of a checkpoint", "leave --load-format dummy or the merge out"
        )
    return adapters.adapter_id


def _not_merging(why: str, hint: str) -> ConfigError:
    return ConfigError(f"--merge-adapter-weights {why}", field="merge_adapter_weights", hint=hint)


class Registry:
    """Finds the source of an adapter.

    A reference that names its source is looked up there and nowhere else; so is an id with the prefix of a source.
    Every other name is looked up in this order: names registered at start, the sources that are `searched` in the
    order of the table (the demo's adapters, folders below an adapter root), the default source.
    """

    def __init__(self, sources: Mapping[str, Source], default: str) -> None:
        self.sources = sources
        self.default = default
        self._registered: dict[str, AdapterRef] = {}

    def register(self, ref: AdapterRef, source: str) -> None:
        """Makes references of this name mean the adapter in this source."""
        self._registered[ref.name] = self._at(ref, source)

    def candidates(self, ref: AdapterRef) -> list[AdapterRef]:
        """The same adapter (not merged) in each source to search, in order; at least one.

        Raises InvalidRequest for sources that a client cannot name on this server.
        """
        if ref.source is not None:
            self._check_source(ref.source)
            return [self._at(ref, ref.source)]
        if (registered := self._registered.get(ref.name)) is not None:
            return [registered]
        for name, source in self.sources.items():
            if source.prefix and ref.id.startswith(source.prefix):
                return [self._at(ref, name)]
        order = [name for name, source in self.sources.items() if source.searched]
        order.append(self.default)
        return [ref.at(name) for name in dict.fromkeys(order) if name in self.sources]

    def _at(self, ref: AdapterRef, source: str) -> AdapterRef:
        return ref.at(source, self.sources[source].prefix)

    def _check_source(self, name: str) -> None:
        names = selectable(self.sources)
        if name not in names:
            raise InvalidRequest(
                f"this server has no adapter_source {name!r}; it has {', '.join(names)}",
                field="adapter_source",
                hint="use one of these, or leave adapter_source out",
            )

    async def resolve(self, ref: AdapterRef, ask: Ask) -> Version:
        """The version in the first source that has the adapter; `ask` resolves a reference in one source.

        Raises AdapterNotFound that lists where it was looked up, or the error of the only source.
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
        raise self._not_found(ref, refusals)

    def _not_found(self, ref: AdapterRef, refusals: list[AdapterError]) -> AdapterError:
        """One error for all sources. Its class is that of the last source's failure, or AdapterForbidden for a path or
        a repository that the caller may not read.
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
