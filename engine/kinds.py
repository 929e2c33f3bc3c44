"""The kinds of request, and the outputs that each needs from its chunks. To add a kind, add an entry to `KINDS`."""

from __future__ import annotations

from dataclasses import dataclass

from engine.messages import NOTHING, POOLED, TOKEN


@dataclass(frozen=True, slots=True)
class RequestKind:
    """The outputs of a request's chunks: NOTHING, TOKEN or POOLED.

    A pooled kind needs a head of its name in the model (see `engine.models.decoder`). The head turns the hidden states
    of one chunk into a vector; the vectors of a request's chunks are added up.
    """

    name: str
    of_each_chunk: int = NOTHING  # POOLED: the head reads all tokens, so no cached prefix is used
    of_last_chunk: int = NOTHING  # the chunk that ends the prompt

    @property
    def generates(self) -> bool:
        """Tokens follow the prompt."""
        return bool(self.of_last_chunk & TOKEN)

    @property
    def pools(self) -> bool:
        return bool((self.of_each_chunk | self.of_last_chunk) & POOLED)

    def wants(self, last: bool) -> int:
        """The outputs of one chunk; `last`: it ends the sequence's tokens."""
        return self.of_each_chunk | (self.of_last_chunk if last else NOTHING)


GENERATE = RequestKind("generate", of_last_chunk=TOKEN)

KINDS: dict[str, RequestKind] = {GENERATE.name: GENERATE}
