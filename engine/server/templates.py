"""Chat templates of adapters, rendered in confined child processes: they are programs of strangers.

Each template has a child of its own, so one that never ends delays only its own adapter: it is killed, and the next
conversation starts another. Few children are kept, the most recently used ones, and a spare one that has not seen a
template yet.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
from collections import OrderedDict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import msgspec

from engine.errors import GenerationError, InvalidRequest, Overloaded
from engine.sandbox import CannotRun, Limits
from engine.sandbox.call import Call
from engine.sandbox.parent import START_S, spawn
from engine.sandbox.tasks.render import CPU_S, LENGTH_BYTES
from engine.server.chat_template import CHECK_MESSAGES

TASK = "engine.sandbox.tasks.render"
MAX_CHILDREN = 8  # that render or are kept, besides a spare one
WALL_S = 20.0  # of one conversation, if the machine is so busy that CPU_S takes that long
WAIT_S = 30.0  # for earlier conversations of the same template
MEMORY_BYTES = 256 << 20
_MAX_CPU_S = 1 << 30  # of a child's life; the task limits each conversation
_ANSWER_BYTES = 1 << 12  # of an answer, besides its text
_BYTES_PER_CHARACTER = 6  # of JSON

_REPORT = "report it to the adapter's author, or use /v1/completions or /generate"


class _Ended(Exception):
    """The child has ended, or must be ended. `reason` continues a sentence about the template."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class _Child:
    """A process that renders one template: `begin` with it, then `render` conversations."""

    def __init__(self) -> None:
        """Raises CannotRun."""
        ours, theirs = socket.socketpair()
        self._socket = ours
        limits = Limits(cpu_s=_MAX_CPU_S, wall_s=0.0, memory_bytes=MEMORY_BYTES)
        call = msgspec.json.encode(Call(TASK, {"socket": theirs.fileno()}, {}, limits))
        try:
            self._process = spawn(call, [theirs.fileno()], subprocess.DEVNULL)
        except CannotRun:
            ours.close()
            raise
        finally:
            theirs.close()
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def begin(self, template: str) -> None:
        """Waits until the process is ready. Raises _Ended."""
        self._reader, self._writer = await asyncio.open_connection(sock=self._socket)
        await self._frame(0, START_S)
        self._write({"template": template})

    async def render(self, asked: Mapping[str, Any]) -> dict[str, str]:
        """The answer to one conversation. Raises _Ended."""
        self._write(asked)
        size = _BYTES_PER_CHARACTER * asked["max_characters"] + _ANSWER_BYTES
        data = await self._frame(size, WALL_S)
        try:
            return msgspec.json.decode(data, type=dict[str, str])
        except (msgspec.MsgspecError, UnicodeError):
            raise _Ended("gave no answer that can be read") from None

    def _write(self, message: Mapping[str, Any]) -> None:
        assert self._writer is not None, "it has begun"
        data = msgspec.json.encode(message)
        self._writer.write(len(data).to_bytes(LENGTH_BYTES, "big") + data)

    async def _frame(self, most: int, seconds: float) -> bytes:
        assert self._reader is not None, "it has begun"
        try:
            async with asyncio.timeout(seconds):
                length = int.from_bytes(await self._reader.readexactly(LENGTH_BYTES), "big")
                if length > most:
                    raise _Ended(f"made an answer of {length} bytes")
                return await self._reader.readexactly(length)
        except TimeoutError:
            raise _Ended(f"takes longer than {seconds:g} s") from None
        except (OSError, asyncio.IncompleteReadError):
            raise _Ended(await self._reason()) from None

    async def _reason(self) -> str:
        """Why the process ended. It has closed its socket, so it is about to end."""
        self.kill()
        code = await asyncio.to_thread(self.reap)
        if code == -signal.SIGXCPU:
            return f"takes more than {CPU_S} s of processor time"
        return f"ended its process (exit code {code})"

    def kill(self) -> None:
        """Idempotent."""
        if self._writer is not None:
            self._writer.transport.abort()
        else:
            self._socket.close()
        self._process.kill()

    def reap(self) -> int:
        """Waits for the end of the killed process; returns its exit code."""
        return self._process.wait()


@dataclass(slots=True)
class _Template:
    """One template and its child."""

    text: str
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)  # one conversation at a time
    users: int = 0  # conversations that wait or are rendered
    child: _Child | None = None


class Templates:
    """Renders templates. Belongs to one event loop."""

    def __init__(self, max_children: int = MAX_CHILDREN) -> None:
        self._max_children = max_children
        self._turns = asyncio.Semaphore(max_children)
        self._known: OrderedDict[str, _Template] = OrderedDict()  # least recently used first
        self._spare: _Child | None = None

    async def render(self, template: str, asked: dict[str, Any]) -> str:
        """The prompt that a template makes; at most `max_characters` of `asked`, which has its variables.

        Raises InvalidRequest for whatever the template does.
        """
        known = self._known.setdefault(template, _Template(template))
        self._known.move_to_end(template)
        known.users += 1
        try:
            async with _turn(known), self._turns:
                answer = await self._ask(known, asked)
        finally:
            known.users -= 1
        if "text" in answer:
            return answer["text"]
        raise _refused(f"refused the messages: {answer.get('refused')}", CHECK_MESSAGES)

    async def _ask(self, known: _Template, asked: Mapping[str, Any]) -> dict[str, str]:
        """The child's answer. Whatever else happens, cancellation included, the child is ended."""
        child, completed = known.child, False
        try:
            if child is None:
                child = known.child = self._take()
                try:
                    await child.begin(known.text)
                except _Ended as error:
                    raise GenerationError(
                        f"the process for the adapter's chat template {error.reason}",
                        hint="try again",
                    ) from None
                self._keep_spare()
            answer = await child.render(asked)
            completed = True
            return answer
        except _Ended as error:
            raise _refused(error.reason) from None
        except CannotRun as error:
            raise GenerationError(
                f"the adapter's chat template cannot be rendered: {error}", hint="try again"
            ) from None
        finally:
            if not completed:
                self._end(known)

    def _take(self) -> _Child:
        """A child for a template that has none: the spare one. Ends the least recently used ones above the limit."""
        running = [one for one in self._known.values() if one.child is not None]
        idle = [one for one in running if not one.users]
        for one in idle[: max(0, len(running) + 1 - self._max_children)]:
            self._end(one)
        for one in [one for one in self._known.values() if not one.users and one.child is None]:
            del self._known[one.text]
        child, self._spare = self._spare or _Child(), None
        return child

    def _keep_spare(self) -> None:
        if self._spare is None:
            with suppress(CannotRun):
                self._spare = _Child()

    def _end(self, known: _Template) -> None:
        """Kills the child of a template, if it has one. It is reaped in a thread: freeing its memory takes time."""
        child, known.child = known.child, None
        if child is not None:
            child.kill()
            asyncio.get_running_loop().run_in_executor(None, child.reap)

    def close(self) -> None:
        """Ends all children. No conversation is rendered any more."""
        children = [*(one.child for one in self._known.values()), self._spare]
        self._known.clear()
        self._spare = None
        for child in filter(None, children):
            child.kill()
            child.reap()


@asynccontextmanager
async def _turn(known: _Template) -> AsyncIterator[None]:
    """The turn of one conversation. Raises Overloaded after WAIT_S: a template that never ends holds up requests, and
    these count towards the server's limit."""
    try:
        async with asyncio.timeout(WAIT_S):
            await known.turn.acquire()
    except TimeoutError:
        raise Overloaded(
            f"the adapter's chat template has been busy for {WAIT_S:g} s", hint="try again later"
        ) from None
    try:
        yield
    finally:
        known.turn.release()


def _refused(what: str, hint: str = _REPORT) -> InvalidRequest:
    return InvalidRequest(f"the adapter's chat template {what}", field="messages", hint=hint)
