"""Server-sent events, read from bytes that may be split anywhere.

Lines end at CR, LF or both (WHATWG HTML, section 9.2.5), and at nothing else: U+2028 and its like are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pydantic_core

from lorax.errors import IncompleteGenerationError, UnknownError, parse_error
from lorax.types import StreamResponse

MAX_EVENT = 64 << 20  # bytes; the last event has the whole text
LINE_END = re.compile(rb"\r\n|\n|\r")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventReader:
    """The data of each event."""

    def __init__(self, max_event: int = MAX_EVENT) -> None:
        self._max_event = max_event
        self._line = bytearray()  # the incomplete one
        self._data: list[bytes] = []  # lines of the incomplete event
        self._size = 0
        self._after_cr = False
        self._begun = False

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The data of the events that `chunk` completes. Raises IncompleteGenerationError for one that is too long."""
        if not chunk:
            return
        if self._after_cr and chunk.startswith(b"\n"):
            chunk = chunk[1:]
        self._after_cr = chunk.endswith(b"\r")
        *complete, rest = LINE_END.split(chunk)
        for piece in complete:
            self._extend(piece)
            line, self._line = bytes(self._line), bytearray()
            if (data := self._end_of_line(line)) is not None:
                yield data
        self._extend(rest)

    def _extend(self, piece: bytes) -> None:
        self._line += piece
        if self._size + len(self._line) > self._max_event:
            raise IncompleteGenerationError(
                f"an event of the stream has more than {self._max_event} bytes, which is the limit"
            )

    def _end_of_line(self, line: bytes) -> bytes | None:
        """The data of the event that `line` ends, if it ends one with data."""
        if not self._begun:
            line, self._begun = line.removeprefix(BYTE_ORDER_MARK), True
        if line:
            field, _, value = line.partition(b":")
            if field == b"data":
                self._data.append(value.removeprefix(b" "))
                self._size += len(value)
            return None
        data, self._data, self._size = self._data, [], 0
        return b"\n".join(data) if data else None


class StreamReader:
    """The answers of one stream. Raises what the server reports in it."""

    def __init__(self, status: int, headers: dict[str, str]) -> None:
        """`status`, `headers`: of the answer that is the stream."""
        self._status = status
        self._headers = headers
        self._events = EventReader()
        self._complete = False

    def feed(self, chunk: bytes) -> Iterator[StreamResponse]:
        for data in self._events.feed(chunk):
            if data != b"[DONE]":
                answer = self._answer(data)
                self._complete |= answer.generated_text is not None
                yield answer

    def _answer(self, data: bytes) -> StreamResponse:
        try:
            payload: Any = pydantic_core.from_json(data)
            if isinstance(payload, dict) and "error" in payload:
                raise parse_error(self._status, payload, self._headers)
            return StreamResponse.model_validate(payload)
        except ValueError:  # pydantic's errors, too
            raise UnknownError("an event of the stream is not an answer", self._status) from None

    def end(self) -> None:
        """Raises IncompleteGenerationError if the stream ended before its answer."""
        if not self._complete:
            raise IncompleteGenerationError("the stream ended before the answer was complete")
