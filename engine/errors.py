"""Every error that a user can meet, in one tree.

    LoraxError
    ├── InvalidRequest            a parameter or a prompt that cannot be served
    ├── MalformedRequest          a body that is not JSON, or not of the documented shape
    ├── AdapterError
    │   ├── AdapterNotFound
    │   ├── AdapterForbidden
    │   ├── AdapterIncompatible   cannot be served exactly with this base model
    │   ├── AdapterTooLarge
    │   └── AdapterLoadFailed     the source did not deliver
    ├── Unauthorized              no API key of the server, or an unknown one
    ├── Forbidden                 an API key without the right
    ├── Overloaded
    ├── GenerationError
    ├── OutOfMemory               a request that does not fit into the device's memory even alone
    ├── EngineDead
    ├── ModelError                the base model cannot be loaded
    └── ConfigError

Each class carries the HTTP status, the machine-readable type and the exit code of the command line.
Errors cross processes as plain dictionaries: `to_wire` and `from_wire`.
"""

from __future__ import annotations

from typing import Any, ClassVar, overload

# Remedies that several modules name.
RENAME = "write adapters under another name and rename them when complete"
OTHER_BASE = "use an adapter of this base model, or serve the adapter's base model"
RESAVE = "save the adapter again with PEFT's save_pretrained (safetensors)"

AGAIN = "try again later; the server's log may say more"
RAISE_LIMIT = "raise --host-cache-gb"
WAIT = "wait until it is written completely, or copy it again; " + RENAME

MAX_MESSAGE = 2000  # characters: names that strangers chose go into messages, and messages are kept and sent on


class LoraxError(Exception):
    """Base of all. `field` names the offending input, `hint` the remedy."""

    status: ClassVar[int] = 500
    error_type: ClassVar[str] = "internal"
    exit_code: ClassVar[int] = 1

    def __init__(self, message: str, *, field: str | None = None, hint: str | None = None) -> None:
        self.message = _cut(message)
        self.field = _cut(field)
        self.hint = _cut(hint)
        super().__init__(self.message)

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message

    def to_wire(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "message": self.message.encode("utf-8", "backslashreplace").decode(),
            "field": self.field,
            "hint": self.hint,
        }


class InvalidRequest(LoraxError):
    status, error_type, exit_code = 422, "validation", 2


class MalformedRequest(LoraxError):
    status, error_type, exit_code = 400, "malformed_request", 2


class AdapterError(LoraxError):
    status, error_type, exit_code = 424, "adapter", 10


class AdapterNotFound(AdapterError):
    status, error_type, exit_code = 404, "adapter_not_found", 11


class AdapterForbidden(AdapterError):
    status, error_type, exit_code = 403, "adapter_forbidden", 12


class AdapterIncompatible(AdapterError):
    status, error_type, exit_code = 422, "adapter_incompatible", 13


class AdapterTooLarge(AdapterError):
    status, error_type, exit_code = 413, "adapter_too_large", 14


class AdapterLoadFailed(AdapterError):
    status, error_type, exit_code = 424, "adapter_load_failed", 15


class Unauthorized(LoraxError):
    status, error_type, exit_code = 401, "unauthorized", 16


class Forbidden(LoraxError):
    status, error_type, exit_code = 403, "forbidden", 17


class Overloaded(LoraxError):
    status, error_type, exit_code = 429, "overloaded", 20


class GenerationError(LoraxError):
    status, error_type, exit_code = 500, "generation", 21


class OutOfMemory(LoraxError):
    status, error_type, exit_code = 503, "out_of_memory", 23


class EngineDead(LoraxError):
    status, error_type, exit_code = 503, "engine_dead", 22


class ModelError(LoraxError):
    status, error_type, exit_code = 500, "model", 3


class ConfigError(LoraxError):
    status, error_type, exit_code = 500, "config", 2


@overload
def _cut(text: str) -> str: ...
@overload
def _cut(text: None) -> None: ...
def _cut(text: str | None) -> str | None:
    """At most MAX_MESSAGE characters: the beginning, which says what is wrong, and the end."""
    if text is None or len(text) <= MAX_MESSAGE:
        return text
    head, tail = MAX_MESSAGE * 3 // 4, MAX_MESSAGE // 4 - 5
    return f"{text[:head]} ... {text[-tail:]}"


def error_classes() -> dict[str, type[LoraxError]]:
    """Every class of the tree by name; what a module keeps to itself (`_Name`) is none."""
    found: dict[str, type[LoraxError]] = {}
    stack: list[type[LoraxError]] = [LoraxError]
    while stack:
        cls = stack.pop()
        if not cls.__name__.startswith("_"):
            found[cls.__name__] = cls
        stack.extend(cls.__subclasses__())
    return found


def from_wire(wire: dict[str, Any]) -> LoraxError:
    """The inverse of `LoraxError.to_wire`; an unknown class becomes a plain `LoraxError`."""
    cls = error_classes().get(str(wire.get("class")), LoraxError)
    return cls(str(wire.get("message", "")), field=wire.get("field"), hint=wire.get("hint"))
