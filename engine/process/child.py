"""The start of a child process: its pipe, its setup, and the report of a failed start.

A child ends when its pipe ends.
"""

from __future__ import annotations

import ctypes
import logging
import signal
import socket
import sys

import msgspec

from engine.errors import EngineDead, LoraxError
from engine.logs import configure_logging
from engine.process.pipe import frame, read_message
from engine.process.pipe_messages import Failed, Setup

PR_SET_PDEATHSIG = 1
PR_SET_NAME = 15

logger = logging.getLogger(__name__)


def connect(role: str, socket_fd: int) -> tuple[socket.socket, Setup]:
    """The pipe to the front, and the setup from it. Ends the process if the front has already ended."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        libc.prctl(PR_SET_NAME, f"lorax-{role}".encode())
    end = socket.socket(fileno=socket_fd)
    setup = read_message(end, Setup)
    if setup is None:
        raise SystemExit(0)
    configure_logging(setup.config.server, role)
    return end, setup


def start_failure(role: str, error: Exception) -> tuple[msgspec.Struct, int]:
    """The message to the front about a failed start, and the exit code."""
    if not isinstance(error, LoraxError):
        logger.error("the %s could not start", role, exc_info=error)
        error = EngineDead(f"the {role} could not start: {error!r}")
    return Failed(error.to_wire()), error.exit_code


def report_failure(end: socket.socket, role: str, error: Exception) -> int:
    """Sends `start_failure` to the front and returns the exit code. For a process without a loop."""
    message, code = start_failure(role, error)
    with end:
        end.setblocking(True)
        end.sendall(frame(message))
    return code
