"""Adapters of the Hugging Face hub, or of any server with its protocol.

Only the adapter's files are downloaded, each once per commit. A branch is resolved to a commit again every
`ttl_s`, so updates are seen. Access to private and gated repositories is checked with each tenant's own token. Files
that a tenant's token unlocked lie in a folder of their own, so no other tenant gets them while the hub is unreachable.
"""

from __future__ import annotations

import logging
import sys
import threading
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from huggingface_hub import HfApi, constants, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import ModelInfo

from engine.adapters import hub_client
from engine.adapters.hub_files import (
    TENANT_FOLDER,
    Integrity,
    discard,
    disk_error,
    is_complete,
    num_bytes,
    remove_unfinished,
)
from engine.adapters.ref import AdapterRef
from engine.adapters.remote import DOWNLOADS, Check, corrupt, first_line, is_transient, pause
from engine.adapters.sources import (
    FOLDERS,
    INDEX_NAME,
    WEIGHT_NAMES,
    AdapterFiles,
    Progress,
    Source,
    Version,
    config_of,
    find_weights,
    open_files,
    shard_names,
    token_hash,
)
from engine.adapters.text_files import TEXT_FILES, check_size
from engine.adapters.transfer import CONFIG_BYTES
from engine.errors import (
    AGAIN,
    RAISE_LIMIT,
    AdapterError,
    AdapterForbidden,
    AdapterIncompatible,
    AdapterLoadFailed,
    AdapterNotFound,
    AdapterTooLarge,
)
from engine.files import OpenFile, is_local
from engine.safetensors import MAX_INDEX_BYTES

T = TypeVar("T")

API_TIMEOUT_S = 10.0

API_SECONDS = 30.0  # limit of one whole API answer
API_BYTES = 8 << 20  # limit of one API answer; a repository of 20,000 files takes 5 MB
_NETWORK = (hub_client.TRANSPORT_ERROR, OfflineModeIsEnabled, LocalEntryNotFoundError, OSError)
_NETWORK_HINT = (
    "try again, or check the network and HF_ENDPOINT; without network, only adapters that are already downloaded can"
    " be served"
)

logger = logging.getLogger(__name__)


class HubSource(Source):
    """See the module. `token` is the operator's; it is used for requests without a token."""

    name = "hub"

    def __init__(
        self,
        token: str | None = None,
        cache: str | Path | None = None,
        *,
        endpoint: str | None = None,
        max_file_bytes: int | None = None,
        max_seconds: float = 600.0,
        ttl_s: float = 60.0,
        attempts: int = 4,
        backoff_s: float = 0.5,
        check: Check | None = None,
    ) -> None:
        """`max_file_bytes`: limit of a weight file, checked before and during the download. `max_seconds`: limit of
        one download. `attempts`: tries per call, `backoff_s` apart, doubling. `check` raises for a configuration that
        is refused."""
        hub_client.install()
        self.ttl_s = ttl_s
        self._token = token
        self._cache = str(cache or constants.HF_HUB_CACHE)
        self._max_file_bytes = max_file_bytes
        self._max_seconds = max_seconds
        self._attempts = attempts
        self._backoff_s = backoff_s
        self._check = check
        self._integrity = Integrity()
        self._api = HfApi(endpoint=endpoint)
        self._clean = threading.Lock()  # taken once, by the first `fetch`

    def tenant(self, token: str | None) -> bytes:
        effective = token or self._token
        return token_hash(effective) if effective else b""

    def resolve(self, ref: AdapterRef, token: str | None) -> Version:
        if ref.id.count("/") != 1:
            raise _invalid(ref)
        tenant_cache = self._tenant_cache(token)
        try:
            info = self._ask(ref, token)
        except hub_client.TooMuch as error:
            raise AdapterLoadFailed(
                f"the hub's answer for {ref.name} is too large: {error}",
                hint="keep the adapter in a repository of fewer files",
            ) from None
        except AdapterLoadFailed as error:
            if (cached := self._cached(ref, token, tenant_cache)) is None:
                if constants.HF_HUB_OFFLINE:
                    raise AdapterNotFound(
                        f"{ref.name} was not downloaded, and the hub is disabled",
                        field="adapter_id",
                        hint="check the name, or unset HF_HUB_OFFLINE",
                    ) from None
                raise
            logger.warning("%s: using the downloaded copy: %s", ref.name, error.message)
            return cached
        except hub_client.Refusal as refusal:
            raise self._explain(refusal.error, ref, token) from None
        private = bool(info.private or info.gated)
        siblings = info.siblings or []
        weights = find_weights((file.rfilename for file in siblings), f"{ref.name} on the hub")
        sizes = {file.rfilename: file.size or 0 for file in siblings}
        size = num_bytes(weights, sizes)
        if self._max_file_bytes is not None and size > self._max_file_bytes:
            raise AdapterTooLarge(
                f"{weights} of {ref.name} has {size} bytes; the limit is {self._max_file_bytes} bytes",
                field="adapter_id",
                hint=RAISE_LIMIT,
            )
        texts = tuple(
            path
            for name in TEXT_FILES
            if (path := str(PurePosixPath(weights).with_name(name))) in sizes
        )
        for name in texts:
            check_size(PurePosixPath(name).name, sizes[name], f"{ref.name} on the hub")
        cache = tenant_cache if private and token else self._cache
        self._remember(ref, info.sha or "", cache)
        salt = self.tenant(token) if private else b""
        return Version(
            self.name,
            ref.id,
            revision=info.sha or "",
            weights=weights,
            cache=cache,
            salt=salt,
            num_bytes=size or None,
            texts=texts,
        )

    def fetch(self, version: Version, token: str | None, progress: Progress) -> AdapterFiles:
        self._clean_up()
        ref = AdapterRef((version.id,), self.name, version.revision)
        roots = [Path(version.cache).resolve()]
        effective = self._effective(token if version.salt else None)  # public: see `_ask`

        def download(name: str, max_bytes: int) -> Path:
            for _ in range(DOWNLOADS):
                with hub_client.bounded(max_bytes, self._max_seconds):
                    path = self._try(
                        lambda: self._api.hf_hub_download(
                            version.id,
                            name,
                            revision=version.revision,
                            cache_dir=version.cache,
                            token=effective,
                            tqdm_class=hub_client.reporter(progress),
                        )
                    )
                if self._integrity.holds(Path(path)):
                    return Path(path)
                discard(Path(path))
            raise corrupt(f"{name} of {ref.name} on the hub", "hash")

        left = version.num_bytes or self._max_file_bytes or sys.maxsize
        try:
            config = download(config_of(version.weights), CONFIG_BYTES)
            if self._check is not None:
                with OpenFile(config, roots) as opened:
                    self._check(opened)
            for name in version.texts:
                download(name, TEXT_FILES[PurePosixPath(name).name])
            if not version.weights.endswith(INDEX_NAME):
                weights = download(version.weights, left)
            else:
                weights = download(version.weights, MAX_INDEX_BYTES)
                with OpenFile(weights, roots) as index:
                    names = shard_names(index)
                for name in names:
                    shard = download(str(PurePosixPath(version.weights).with_name(name)), left)
                    left = max(0, left - shard.stat().st_size)
        except OSError as error:
            raise disk_error(error) from None
        except hub_client.TooMuch as error:
            raise AdapterTooLarge(
                f"a file of {ref.name} on the hub is too large: {error}",
                field="adapter_id",
                hint=RAISE_LIMIT,
            ) from None
        except hub_client.Refusal as refusal:
            raise self._explain(refusal.error, ref, token) from None
        return open_files(config, weights, roots, version.revision)

    def _clean_up(self) -> None:
        """Removes what killed processes left, at the first download of this process."""
        if self._clean.acquire(blocking=False):
            remove_unfinished(Path(self._cache))

    def _ask(self, ref: AdapterRef, token: str | None) -> ModelInfo:
        """The hub's answer for this tenant. A token that the hub does not know, such as a gateway's key, does not
        matter for a public repository: the hub is asked again, without any token."""
        try:
            return self._try(lambda: self._info(ref, self._effective(token)))
        except hub_client.Refusal as refusal:
            if not token or _status(refusal.error) != 401:
                raise
            try:
                return self._try(lambda: self._info(ref, False))
            except (
                hub_client.Refusal,
                AdapterLoadFailed,
            ):  # a refusal stays one, also of a hub that is down
                raise refusal from None

    def _info(self, ref: AdapterRef, effective: str | bool) -> ModelInfo:
        """One answer of the hub. For gated repositories, checks that the token may download the files."""
        with hub_client.bounded(API_BYTES, API_SECONDS):
            info = self._api.model_info(
                ref.id,
                revision=ref.revision,
                files_metadata=True,
                timeout=API_TIMEOUT_S,
                token=effective,
            )
            if info.gated:
                self._api.auth_check(ref.id, token=effective)
        return info

    def _effective(self, token: str | None) -> str | bool:
        """The request's token, else the configured one; False keeps huggingface_hub from using a stored login."""
        return token or self._token or False

    def _tenant_cache(self, token: str | None) -> str:
        if not token:
            return self._cache
        return str(Path(self._cache) / TENANT_FOLDER / token_hash(token).hex())

    def _remember(self, ref: AdapterRef, commit: str, cache: str) -> None:
        """Writes the commit of a branch where huggingface_hub looks for it, for use without network."""
        revision = ref.revision or constants.DEFAULT_REVISION
        if revision == commit or ".." in revision or revision.startswith("/"):
            return
        path = Path(cache) / repo_folder_name(repo_id=ref.id, repo_type="model") / "refs" / revision
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(commit)
        except OSError as error:  # a read-only cache
            logger.debug("cannot write %s: %s", path, error)

    def _cached(self, ref: AdapterRef, token: str | None, tenant_cache: str) -> Version | None:
        """The downloaded copy that this tenant may use: from its own cache, or from the operator's."""
        for cache in dict.fromkeys((tenant_cache, self._cache)):

            def find(name: str, cache: str = cache) -> str | None:
                path = try_to_load_from_cache(
                    ref.id, name, cache_dir=cache, revision=ref.revision or None
                )
                return path if isinstance(path, str) else None

            weights = next(
                (name for name in _CANDIDATES if find(name) and find(config_of(name))), None
            )
            config = find(config_of(weights)) if weights else None
            if config and weights and is_complete(Path(config).parent, weights):
                salt = self.tenant(token) if cache != self._cache else b""
                return Version(
                    self.name,
                    ref.id,
                    revision=Path(config).parents[weights.count("/")].name,
                    weights=weights,
                    cache=cache,
                    salt=salt,
                    unconfirmed=True,
                )
        return None

    def _try(self, call: Callable[[], T]) -> T:
        """Repeats the call after transient failures. Raises hub_client.Refusal for a permanent one."""
        for attempt in range(1, self._attempts + 1):
            try:
                return call()
            except (HFValidationError, EntryNotFoundError) as error:
                if not isinstance(error, LocalEntryNotFoundError):
                    raise hub_client.Refusal(error) from None
                failure: Exception = error
            except HfHubHTTPError as error:
                if not is_transient(error.response.status_code):
                    raise hub_client.Refusal(error) from None
                failure = error
            except OfflineModeIsEnabled as error:
                raise AdapterLoadFailed(
                    f"the hub is disabled: {first_line(error)}", hint="unset HF_HUB_OFFLINE"
                ) from None
            except _NETWORK as error:
                if isinstance(error, OSError) and is_local(error):
                    raise disk_error(error) from None
                failure = error
            except hub_client.TooMuch:
                raise
            except Exception as error:  # a boundary: the answer may be anything
                failure = ValueError(f"the answer cannot be read: {first_line(error)}")
            if attempt < self._attempts:
                pause(attempt, self._backoff_s)
        raise AdapterLoadFailed(
            f"the hub request failed: {first_line(failure)}",
            hint=_NETWORK_HINT,
        )

    def _explain(self, error: Exception, ref: AdapterRef, token: str | None) -> AdapterError:
        """The error for the client."""
        whose = "the request's api_token" if token else "the server's token"
        hint = f"check {whose}" if token or self._token else "send an api_token that may read it"
        status = _status(error)
        if isinstance(error, HFValidationError):
            return _invalid(ref)
        if isinstance(error, RevisionNotFoundError):
            return AdapterNotFound(
                f"{ref.id} has no revision {ref.revision!r} on the hub",
                field="adapter_id",
                hint="leave the revision out, or use a branch, tag or commit of the repository",
            )
        if isinstance(error, GatedRepoError):
            return AdapterForbidden(
                f"{ref.id} is gated and {whose} has no access",
                field="api_token",
                hint=f"request access at {self._api.endpoint}/{ref.id}",
            )
        if status in (401, 403):
            return AdapterForbidden(
                f"{ref.id} is private or does not exist on the hub",
                field="api_token",
                hint=hint,
            )
        if isinstance(error, EntryNotFoundError):
            return AdapterIncompatible(
                f"a file of {ref.name} is missing on the hub", hint="upload the whole adapter again"
            )
        if status == 404:
            return AdapterNotFound(
                f"there is no {ref.id} on the hub",
                field="adapter_id",
                hint="if it is private, " + hint,
            )
        return AdapterLoadFailed(f"the hub refused {ref.name}: {first_line(error)}", hint=AGAIN)


def _status(error: Exception) -> int:
    return error.response.status_code if isinstance(error, HfHubHTTPError) else 404


def _invalid(ref: AdapterRef) -> AdapterNotFound:
    """The hub cannot have such a name, so it is not asked: no network is needed to say so."""
    return AdapterNotFound(
        f"{ref.id!r} is not a valid hub id", field="adapter_id", hint="use owner/name"
    )


_CANDIDATES = [folder + name for folder in FOLDERS for name in WEIGHT_NAMES]
