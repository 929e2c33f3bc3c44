"""Stop sequences, matched on text as it arrives, wherever tokens begin and end.

The match is the one that ends first (of several, the longest), so it does not depend on how the text was cut into
pieces: what was streamed is what would have been found in the whole.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through up to a stop sequence.

    With `keep` the stop sequence is the end of the text (LoRAX), else it is removed (OpenAI), and text that may be the
    beginning of one is held back until the next piece decides.
    """

    __slots__ = ("_buffer", "_keep", "_num_out", "matched", "stops")

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self.stops = tuple(stops)
        self._keep = keep
        self._buffer = ""  # the longest end of the text so far that begins a stop sequence
        self._num_out = 0  # characters of the buffer that were given out
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certain after `piece`; sets `matched` when it ends there."""
        if not self.stops:
            return piece
        text = self._buffer + piece
        found = [(text.find(stop) + len(stop), stop) for stop in self.stops if stop in text]
        if found:
            end, self.matched = min(found, key=lambda hit: (hit[0], -len(hit[1])))
            cut = end if self._keep else end - len(self.matched)
            out = text[self._num_out : cut]
            self._buffer, self._num_out = "", 0
            return out
        held = self._overlap(text)
        out = text[self._num_out :] if self._keep else text[: len(text) - held]
        self._buffer = text[len(text) - held :]
        self._num_out = held if self._keep else 0
        return out

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        out = self._buffer[self._num_out :]
        self._buffer, self._num_out = "", 0
        return out

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop sequence."""
        longest = 0
        for stop in self.stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at >= 0:
                if stop.startswith(text[at:]):
                    longest = max(longest, len(text) - at)
                    break
                at = text.find(stop[0], at + 1)
        return longest
