"""What sources of plain files share: an adapter is a folder of files that a store describes and downloads one by one.

The configuration is downloaded first. Sizes and rank are checked before any weights are. Each file is compared with the
checksums that the store lists; a file that differs is downloaded once more. Weights may be in several files, with an
index that names them.
"""

from __future__ import annotations

import logging
import time
from abc import abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Protocol

from engine.adapters.checksums import Checksum
from engine.adapters.disk_cache import DiskCache
from engine.adapters.ref import AdapterRef
from engine.adapters.remote import DOWNLOADS, Check, changed, corrupt, revision_of
from engine.adapters.sources import (
    CONFIG_NAME,
    FOLDERS,
    INDEX_NAME,
    WEIGHT_NAMES,
    AdapterFiles,
    Progress,
    Source,
    Version,
    damaged,
    find_weights,
)
from engine.adapters.text_files import TEXT_FILES, check_size
from engine.adapters.transfer import CONFIG_BYTES, NewFile, TooSlow, Transfer
from engine.checkpoint import TOKENIZER_FILES, WHOLE_NAMES
from engine.errors import (
    RAISE_LIMIT,
    RESAVE,
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
)
from engine.files import OpenFile
from engine.safetensors import MAX_INDEX_BYTES, MAX_SHARDS, parse_index

RESOLVE_S = 30.0  # limit of one `resolve`
MAX_MODEL_SHARDS = 1024
MODEL_CONFIG = "config.json"
MODEL_FILES = (  # of a base model, where a store cannot list a folder
    MODEL_CONFIG,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file as its store describes it."""

    name: str
    stamp: str  # changes with the contents
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class Listing:
    """The files of one adapter, all in one folder."""

    folder: str
    config: StoredFile
    weights: StoredFile  # the only weight file, or the index of several
    shards: tuple[StoredFile, ...] = ()
    texts: tuple[StoredFile, ...] = ()  # those of TEXT_FILES that exist

    @property
    def weight_bytes(self) -> int:
        return sum(file.size for file in (self.weights, *self.shards))

    @property
    def revision(self) -> str:
        files = (self.config, self.weights, *self.shards, *self.texts)
        return revision_of((file.name, file.stamp, file.size) for file in files)


class Target(Protocol):
    """Where a download goes."""

    def write(self, data: bytes, offset: int) -> None: ...


class StoreSource(Source):
    """See the module. A store implements `_describe` and `_download`."""

    sought = "adapter"  # what a folder without one is said to lack

    def __init__(
        self, cache: DiskCache, max_file_bytes: int | None, ttl_s: float, check: Check | None
    ) -> None:
        """`max_file_bytes`: limit of an adapter's weights. `check` raises for a configuration that is refused."""
        self.ttl_s = ttl_s
        self._cache = cache
        self._max_file_bytes = max_file_bytes
        self._check = check

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        if (kept := self._kept(ref)) is not None:
            return kept
        try:
            return self.current(ref)
        except AdapterLoadFailed as error:
            return self.recall(self.name, ref, b"", error)

    def current(self, ref: AdapterRef) -> Version:
        """As `resolve`, by the source's answer alone."""
        listing = self._find(ref)
        limits = (
            (listing.config.name, listing.config.size, CONFIG_BYTES, RESAVE),
            ("weights", listing.weight_bytes, self._max_file_bytes, RAISE_LIMIT),
        )
        for name, size, limit, hint in limits:
            if limit is not None and size > limit:
                raise AdapterTooLarge(
                    f"{name} of {self._shown(listing.folder)}: {size} bytes; the limit is {limit} bytes",
                    field="adapter_id",
                    hint=hint,
                )
        for file in listing.texts:
            check_size(file.name, file.size, self._shown(listing.folder))
        return Version(
            self.name,
            listing.folder,
            revision=listing.revision,
            weights=listing.weights.name,
            num_bytes=listing.weight_bytes,
            asked=ref.name,
        )

    def recall(
        self, source: str, ref: AdapterRef, salt: bytes, error: AdapterLoadFailed
    ) -> Version:
        """The version on disk that a reference last meant, while its source is away. Raises `error` without one."""
        known = self._cache.recall(source, self._where(), ref.name, salt)
        if known is None:
            raise error
        logger.warning("%s: using the downloaded copy: %s", ref.name, error.message)
        return known

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        def fill(folder: Path, transfer: Transfer) -> None:
            listing = self._list(version.id)
            if listing is None or listing.revision != version.revision:
                raise changed(self._shown(version.id))
            texts = sum(file.size for file in listing.texts)
            transfer.reserve(listing.config.size + listing.weight_bytes + texts)
            self._save(listing.folder, listing.config, folder, transfer)
            if self._check is not None:
                with OpenFile(folder / CONFIG_NAME) as config:
                    self._check(config)
            for file in (*listing.texts, listing.weights, *listing.shards):
                self._save(listing.folder, file, folder, transfer)
            self._confirm(version)

        return self._cache.fetch(version, self._where(), progress, fill)

    def keep_model(self, folder: str, weights: bool, cache: DiskCache) -> Path:
        """A base model's configuration, tokenizer and, if wanted, weights, downloaded once per version into `cache`.

        Raises as `resolve`, with errors that speak of the model.
        """
        folder = folder.rstrip("/")
        files = self._model_files(folder, weights)
        total = sum(file.size for file in files)
        revision = revision_of((file.name, file.stamp, file.size) for file in files)

        def fill(into: Path, transfer: Transfer) -> None:
            logger.info("downloading %s: %d MiB", self._shown(folder), total >> 20)
            transfer.reserve(total)
            for file in files:
                self._save(folder, file, into, transfer)

        version = Version(self.name, folder, revision, weights="")
        return cache.keep(version, self._where(), lambda done, total: None, fill)

    def _model_files(self, folder: str, weights: bool) -> list[StoredFile]:
        listed = self._model_listing(folder, time.monotonic() + RESOLVE_S)

        def matching(*patterns: str) -> list[StoredFile]:
            found = [
                file for name, file in listed.items() if any(fnmatch(name, p) for p in patterns)
            ]
            return sorted(found, key=lambda file: file.name)

        where = self._shown(folder)
        if MODEL_CONFIG not in listed:
            raise AdapterNotFound(
                f"there is no {MODEL_CONFIG} in {where}",
                hint="give the folder that save_pretrained of transformers has written",
            )
        found = matching("*.safetensors") or matching("pytorch_model*.bin")
        if weights and not found:
            raise AdapterIncompatible(
                f"{where} has neither {' nor '.join(WHOLE_NAMES)}",
                hint="give the folder that save_pretrained of transformers has written",
            )
        return [*matching(*TOKENIZER_FILES), *(found if weights else [])]

    def _model_listing(self, folder: str, end_by: float) -> dict[str, StoredFile]:
        """The files of a base model, by name."""
        found = {}
        for name in MODEL_FILES:
            if (file := self._describe(folder, name, end_by)) is not None:
                found[name] = file
        if (index := found.get(f"{WHOLE_NAMES[0]}.index.json")) is not None:
            shards = self._shards(folder, index, found, end_by, MAX_MODEL_SHARDS)
            found |= {file.name: file for file in shards}
        return found

    def _find(self, ref: AdapterRef) -> Listing:
        """The files of a reference. Raises AdapterNotFound, or as `resolve`."""
        folder = ref.name.rstrip("/")
        listing = self._list(folder)
        if listing is None:
            raise AdapterNotFound(
                f"there is no {self.sought} in {self._shown(folder)}",
                field="adapter_id",
                hint="give the folder of adapter_config.json",
            )
        return listing

    @abstractmethod
    def _describe(self, folder: str, name: str, end_by: float) -> StoredFile | None:
        """One file; None if it does not exist."""

    @abstractmethod
    def _download(self, folder: str, file: StoredFile, target: Target, transfer: Transfer) -> None:
        """Downloads exactly `file.size` bytes. Raises AdapterLoadFailed if the file has changed."""

    def _look(self, folder: str, end_by: float) -> dict[str, StoredFile]:
        """The configuration and the preferred weights, by name; other files do not matter."""
        config = self._describe(folder, CONFIG_NAME, end_by)
        if config is None:
            return {}
        for name in WEIGHT_NAMES:
            if (weights := self._describe(folder, name, end_by)) is not None:
                return {config.name: config, weights.name: weights}
        return {config.name: config}

    def _kept(self, ref: AdapterRef) -> Version | None:
        """The exact version that a reference names, if it is on disk."""
        return None

    def _exists(self, folder: str) -> bool:
        """Whether anything lies in a folder without a configuration, as far as the store can say."""
        return False

    def _checksums(self, folder: str, file: StoredFile) -> Sequence[Checksum]:
        """What the store lists of a file's contents."""
        return ()

    def _confirm(self, version: Version) -> None:
        """Raises AdapterLoadFailed if the files changed during the download, where `_download` cannot tell."""

    def _where(self) -> str:
        """What else the contents depend on, such as an endpoint."""
        return ""

    def _shown(self, folder: str) -> str:
        return f"{self.prefix}{folder}"

    def _list(self, folder: str) -> Listing | None:
        """The files of the adapter in a folder, or in one of Ludwig's below it; None if nothing lies there.

        Raises AdapterIncompatible if other files lie there.
        """
        end_by = time.monotonic() + RESOLVE_S
        folder = folder.rstrip("/")
        for below in FOLDERS:
            at = f"{folder}/{below}".rstrip("/")
            files = self._look(at, end_by)
            if CONFIG_NAME in files:
                break
        else:
            if not self._exists(folder):
                return None
        weights = files[find_weights(files, self._shown(folder))]
        shards = self._shards(at, weights, files, end_by) if weights.name == INDEX_NAME else ()
        return Listing(at, files[CONFIG_NAME], weights, shards, self._texts(at, end_by))

    def _texts(self, folder: str, end_by: float) -> tuple[StoredFile, ...]:
        """Those of TEXT_FILES that exist. Some stores answer that a file which does not exist is forbidden."""
        found = []
        for name in TEXT_FILES:
            with suppress(AdapterForbidden):
                found.append(self._describe(folder, name, end_by))
        return tuple(file for file in found if file is not None)

    def _shards(
        self,
        folder: str,
        index: StoredFile,
        files: dict[str, StoredFile],
        end_by: float,
        limit: int = MAX_SHARDS,
    ) -> tuple[StoredFile, ...]:
        """The files that an index names. The index is small, so it is read before any of them is looked up."""
        where = f"{self._shown(folder)}/{index.name}"
        if index.size > MAX_INDEX_BYTES:
            raise damaged(where, f"it has {index.size} bytes, the limit is {MAX_INDEX_BYTES}")
        text = _Memory(index.size)
        transfer = Transfer(end_by, lambda done, total: None, lambda num_bytes: None)
        try:
            self._download(folder, index, text, transfer)
            names = sorted(set(parse_index(bytes(text.data), limit).values()))
        except TooSlow as error:
            raise AdapterLoadFailed(f"{where}: {error.strerror}", hint="try again later") from None
        except ValueError as error:
            raise damaged(where, str(error)) from None
        shards = []
        for name in names:
            file = files.get(name) or self._describe(folder, name, end_by)
            if file is None:
                raise AdapterIncompatible(
                    f"{where} names {name}, which does not exist",
                    field=index.name,
                    hint="upload every file",
                )
            shards.append(file)
        return tuple(shards)

    def _save(self, folder: str, file: StoredFile, into: Path, transfer: Transfer) -> None:
        """Downloads a file and checks it, twice if its checksum differs the first time."""
        path = into / file.name
        for _ in range(DOWNLOADS):
            with NewFile(path, file.size) as target:
                self._download(folder, file, target, transfer)
                checksums = self._checksums(folder, file)
                failed = [one for one in checksums if not one.matches(target.fd, file.size)]
            if not failed:
                return
            path.unlink()
            transfer.wrote(-file.size)
        raise corrupt(f"{self._shown(folder)}/{file.name}", failed[0].algorithm)


class _Memory:
    """A small file in memory."""

    def __init__(self, size: int) -> None:
        self.data = bytearray(size)

    def write(self, data: bytes, offset: int) -> None:
        self.data[offset : offset + len(data)] = data
