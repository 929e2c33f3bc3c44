"""Updates on their way to the front."""

from __future__ import annotations

from engine.errors import LoraxError
from engine.messages import FinishReason, TokenOutput, Update
from engine.scheduler.fairness import Slots
from engine.scheduler.sequence import Sequence


class Outbox:
    """Holds updates until they are taken, and a last update until it is safe to send.

    A copy into the arena reads the adapter's host image, which the front keeps for as long as a request for it is open.
    The last update of a request that ends while its adapter is being copied therefore waits for the copy.
    """

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._ready: list[Update] = []
        self._withheld: dict[bytes, list[Update]] = {}  # by digest of the adapter

    def __len__(self) -> int:
        return len(self._ready) + sum(map(len, self._withheld.values()))

    def put(self, sequence: Sequence, output: TokenOutput) -> None:
        """Send a token of a sequence that is still open."""
        self._ready.append(_update(sequence, output))

    def put_last(
        self,
        sequence: Sequence,
        output: TokenOutput | None = None,
        finish: FinishReason | None = None,
        error: LoraxError | None = None,
    ) -> None:
        """Send the last update of a sequence, with a finish reason or an error."""
        update = _update(sequence, output, finish, error)
        image = sequence.adapter
        if image is not None and self._slots.is_placing(image.digest):
            self._withheld.setdefault(image.digest, []).append(update)
        else:
            self._ready.append(update)

    def copied(self, digest: bytes) -> None:
        """The adapter is resident: nothing reads its host image any more."""
        self._ready += self._withheld.pop(digest, [])

    def take(self) -> list[Update]:
        taken, self._ready = self._ready, []
        return taken


def _update(
    sequence: Sequence,
    output: TokenOutput | None = None,
    finish: FinishReason | None = None,
    error: LoraxError | None = None,
) -> Update:
    admitted, cached = None, 0
    if not sequence.announced:
        admitted, cached = sequence.admitted, sequence.cached_tokens
        sequence.announced = admitted is not None
    prompt_logprobs, prompt_tops = None, []
    if output is not None and sequence.prompt_logprobs is not None:
        prompt_logprobs, sequence.prompt_logprobs = sequence.prompt_logprobs, None
        prompt_tops, sequence.prompt_tops = sequence.prompt_tops, []
    return Update(
        id=sequence.request.id,
        tokens=[output] if output is not None else [],
        finish=finish,
        error=error.to_wire() if error is not None else None,
        usage=sequence.usage() if finish is not None else None,
        admitted=admitted,
        cached_tokens=cached,
        prompt_logprobs=prompt_logprobs,
        prompt_tops=prompt_tops,
        pooled=sequence.pooled if finish == "pooled" else None,
    )
