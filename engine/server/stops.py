"""Stop sequences, matched on text as it arrives, independent of token boundaries.

The match is the stop sequence that ends first; of several, the longest. So the result does not depend on how the text
was cut into pieces: a stream stops where the whole text would.
"""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Passes text through up to a stop sequence.

    With `keep` the text ends with the stop sequence (LoRAX). Otherwise the stop sequence is removed (OpenAI), and text
    that may begin one is held back until the next piece decides.
    """

    __slots__ = ("_buffer", "_keep", "_num_out", "matched", "stops")

    def __init__(self, stops: Sequence[str], *, keep: bool) -> None:
        self.stops = tuple(stops)
        self._keep = keep
        self._buffer = ""  # the longest suffix of the text so far that begins a stop sequence
        self._num_out = 0  # characters of the buffer that were passed through
        self.matched: str | None = None

    def push(self, piece: str) -> str:
        """The text that is certain after `piece`; sets `matched` if a stop sequence ends it."""
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
        """The text that was held back, at the end of the text."""
        out = self._buffer[self._num_out :]
        self._buffer, self._num_out = "", 0
        return out

    def _overlap(self, text: str) -> int:
        """Length of the longest suffix of `text` that begins a stop sequence."""
        longest = 0
        for stop in self.stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at >= 0:
                if stop.startswith(text[at:]):
                    longest = max(longest, len(text) - at)
                    break
                at = text.find(stop[0], at + 1)
        return longest
