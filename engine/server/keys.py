"""The server's API keys: who may use it, and as which tenant.

Keys come from `--api-key`, all of the tenant `default`, and from `--api-keys-file`. The file is read again when its
contents change. A file that cannot be used is logged, and the keys read before stay valid. Only digests of keys are
kept, and no message quotes the file.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
import yaml
from msgspec import Meta, Struct

from engine.config import ServerConfig
from engine.errors import ConfigError
from engine.messages import NO_TENANT, TenantRef

log = logging.getLogger(__name__)

DEFAULT_TENANT = "default"
POLL_S = 1.0  # between two looks at the file
MAX_FILE_BYTES = 4 << 20
MAX_DEPTH = 4  # a list of mappings has 2
FORM = "write a list of entries with a name, and a key or its sha256; put texts in quotes"
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is ten times as fast


@dataclass(frozen=True, slots=True)
class Tenant:
    """Whose key a request has. Several keys may be one tenant's."""

    name: str
    priority: int = 0  # higher: first
    weight: float = 1.0  # its share, in proportion to the others'
    admin: bool = False  # may change what others get: loaded adapters, pins and aliases
    share: float = 1.0  # its weight over the sum of all


def ref_of(tenant: Tenant | None) -> TenantRef:
    """For the exchange. None: of a server without keys."""
    return NO_TENANT if tenant is None else TenantRef(tenant.name, tenant.share)


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of the file."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9._-]{1,64}\Z")]
    key: str | None = None
    sha256: Annotated[str, Meta(pattern=r"^[0-9A-Fa-f]{64}\Z")] | None = None
    priority: Annotated[int, Meta(ge=-1000, le=1000)] = 0
    weight: Annotated[float, Meta(ge=0.001, le=1000)] = 1.0
    admin: bool = False


_Owned = tuple[bytes, Tenant]  # the digest of a key, and whose it is


class Keys:
    """All keys of one server. Raises ConfigError if a setting or the file cannot be used."""

    def __init__(self, config: ServerConfig) -> None:
        self._path = Path(config.api_keys_file) if config.api_keys_file else None
        self.required = bool(config.api_key) or self._path is not None
        if config.prefix_cache_per_tenant and not self.required:
            raise ConfigError(
                "--prefix-cache-per-tenant needs API keys, which tell tenants apart",
                field="prefix_cache_per_tenant",
                hint="set --api-keys-file or --api-key",
            )
        if not all(map(_is_valid, config.api_key)):
            raise ConfigError(
                "--api-key has other characters than printable ASCII, or spaces", field="api_key"
            )
        # Tables hold keyed hashes, so the time of a lookup tells nothing about the keys.
        self._secret = secrets.token_bytes(32)
        own = Tenant(DEFAULT_TENANT, admin=True)
        self._fixed = [(_digest(key), own) for key in config.api_key]
        self._state: bytes | str = b""  # digest of the file's contents, or why they cannot be read
        if self._path is None:
            self._table = self._tabled(self._fixed)
        else:
            data = _contents(self._path)
            self._state = hashlib.sha256(data).digest()
            self._table = self._read(self._path, data)

    @property
    def num_keys(self) -> int:
        return len(self._table)

    @property
    def in_file(self) -> bool:
        """Whether there is a file, which `watch` reads again."""
        return self._path is not None

    def tenant_of(self, key: str) -> Tenant | None:
        """Whose key it is; None for an unknown one."""
        return self._table.get(self._hash(_digest(key)))

    def refresh(self) -> None:
        """Reads the file again if its contents changed. Blocks. Logs a file that cannot be used, once."""
        assert self._path is not None, "there is a file"
        found: bytes | ConfigError
        try:
            found = _contents(self._path)
        except ConfigError as error:
            found = error
        state = hashlib.sha256(found).digest() if isinstance(found, bytes) else str(found)
        if state == self._state:
            return
        self._state = state
        try:
            if isinstance(found, ConfigError):
                raise found
            self._table = self._read(self._path, found)
        except ConfigError as error:
            log.error("%s; the keys read before stay valid", error)
        else:
            log.info("read %s again: %d API keys", self._path, self.num_keys)

    async def watch(self) -> None:
        """Reads the file again whenever it changes, until cancelled."""
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await asyncio.to_thread(self.refresh)
            except Exception:  # a task boundary: the keys read before stay valid
                log.exception("cannot read the API keys again")

    def _read(self, path: Path, data: bytes) -> dict[bytes, Tenant]:
        return self._tabled([*self._fixed, *_parse(path, data)])

    def _hash(self, digest: bytes) -> bytes:
        return hashlib.blake2b(digest, key=self._secret, digest_size=32).digest()

    def _tabled(self, owned: Iterable[_Owned]) -> dict[bytes, Tenant]:
        """Keyed hash -> tenant. Raises ConfigError if a key has two tenants, or a tenant two shares."""
        table: dict[bytes, Tenant] = {}
        tenants: dict[str, Tenant] = {}
        for digest, tenant in owned:
            if table.setdefault(self._hash(digest), tenant).name != tenant.name:
                raise ConfigError(
                    f"a key of the tenant {tenant.name!r} is also another's",
                    field="api_keys_file",
                    hint="give each tenant keys of its own",
                )
            if tenants.setdefault(tenant.name, tenant) != tenant:
                raise ConfigError(
                    f"the tenant {tenant.name!r} has different priorities, weights or rights",
                    field="api_keys_file",
                    hint="repeat the same priority, weight and admin with each of its keys; "
                    "those of --api-key are admin",
                )
        total = sum(tenant.weight for tenant in tenants.values())
        return {key: replace(one, share=one.weight / total) for key, one in table.items()}


def _is_valid(key: str) -> bool:
    return bool(key) and key.isascii() and key.isprintable() and " " not in key


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _contents(path: Path) -> bytes:
    """Raises ConfigError."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror}", field="api_keys_file", hint="check the path"
        ) from None
    if len(data) > MAX_FILE_BYTES:
        raise _unusable(path, f"it is larger than {MAX_FILE_BYTES} bytes, which is the limit")
    return data


def _parse(path: Path, data: bytes) -> list[_Owned]:
    """The keys in a file. Raises ConfigError, with the line or the place of the problem."""
    try:
        if not _is_flat(data):
            raise _unusable(path, f"it is nested more than {MAX_DEPTH} deep")
        found = yaml.load(data, _LOADER)
        entries = msgspec.convert(found, list[_Entry])
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}" if error.problem_mark else "it"
        raise _unusable(path, f"{line} is not valid YAML") from None
    except (yaml.YAMLError, ValueError) as error:
        if not isinstance(error, msgspec.ValidationError):
            raise _unusable(path, "it is not valid YAML") from None
        problem, _, where = str(error).partition(" - at `$")
        if "unknown field" in problem:  # its name may be a key
            problem = "there is a field other than name, key, sha256, priority, weight and admin"
        raise _unusable(path, f"{where.rstrip('`') or 'it'}: {problem}") from None
    return [_owned(path, f"[{index}]", entry) for index, entry in enumerate(entries)]


def _is_flat(data: bytes) -> bool:
    """Whether lists and mappings are nested at most MAX_DEPTH deep: the loader would overflow the stack."""
    depth = 0
    for event in yaml.parse(data, _LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            return False
    return True


def _owned(path: Path, where: str, entry: _Entry) -> _Owned:
    if (entry.key is None) == (entry.sha256 is None):
        raise _unusable(path, f"{where} needs either a key or a sha256")
    if entry.key is not None and not _is_valid(entry.key):
        raise _unusable(
            path, f"{where}.key is empty, or has other characters than printable ASCII, or spaces"
        )
    digest = _digest(entry.key) if entry.key is not None else bytes.fromhex(entry.sha256 or "")
    return digest, Tenant(entry.name, entry.priority, entry.weight, entry.admin)


def _unusable(path: Path, problem: str) -> ConfigError:
    return ConfigError(
        f"{path} cannot be used as --api-keys-file: {problem}", field="api_keys_file", hint=FORM
    )
