"""Logging of the server: one line for each record, or one JSON object."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime

import msgspec

from engine.config import ServerConfig


class JsonFormatter(logging.Formatter):
    """{"timestamp", "level", "target", "message"}, and "exception" where there is one."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "timestamp": datetime.fromtimestamp(record.created, UTC).isoformat(),
            "level": record.levelname,
            "target": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def configure_logging(config: ServerConfig) -> None:
    """Sets up the logger `engine` on stderr."""
    output = logging.StreamHandler(sys.stderr)
    plain = logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s")
    output.setFormatter(JsonFormatter() if config.json_output else plain)
    logger = logging.getLogger("engine")
    logger.handlers[:] = [output]
    logger.setLevel(config.log_level.upper())
    logger.propagate = False
