"""Logging of every process to stderr: each record is one line of text or one JSON object."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

from engine.config import ServerConfig

LIBRARIES = ("aiohttp", "asyncio")  # their warnings and errors are logged too


class JsonFormatter(logging.Formatter):
    """{"timestamp", "level", "process", "target", "message"}, "exception" if there is one, and the `fields` of a record
    that has some."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self.role = role

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "process": f"{self.role}[{record.process}]",
            "target": record.name,
            "message": printable(record.getMessage()),
        }
        given: dict[str, Any] = getattr(record, "fields", {})
        for name, value in given.items():
            line.setdefault(name, printable(value) if isinstance(value, str) else value)
        if record.exc_info:
            line["exception"] = printable(self.formatException(record.exc_info))
        return msgspec.json.encode(line).decode()


def printable(text: str) -> str:
    """`text` with escapes for what UTF-8 cannot encode (surrogates in names that clients sent)."""
    return text.encode("utf-8", "backslashreplace").decode()


def configure_logging(config: ServerConfig, role: str = "front") -> None:
    """Sends the records of this program and its libraries to stderr. `role` names this process in each record."""
    output = logging.StreamHandler(sys.stderr)
    plain = f"%(asctime)s %(levelname)s {role}[%(process)d] %(name)s: %(message)s"
    output.setFormatter(JsonFormatter(role) if config.json_output else logging.Formatter(plain))
    level: int = logging.getLevelNamesMapping()[config.log_level.upper()]
    for name in ("engine", *LIBRARIES):
        logger = logging.getLogger(name)
        logger.handlers[:] = [output]
        logger.setLevel(level if name == "engine" else max(level, logging.WARNING))
        logger.propagate = False
