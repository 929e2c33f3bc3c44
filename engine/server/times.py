"""LoRAX's headers with times and token counts, of a whole answer in any format."""

from __future__ import annotations

import time

from engine.server.generation import Generation


def times_of(generation: Generation) -> dict[str, str]:
    """Times in whole milliseconds, as LoRAX; times per token with three decimals."""
    timings = generation.timings
    now = time.monotonic()
    admitted = timings.admitted or timings.validated
    finished = timings.finished or now
    first = timings.first_token or finished
    count = generation.generated_tokens

    def ms(seconds: float) -> str:
        return str(round(max(0.0, seconds) * 1000))

    def fine(seconds: float) -> str:
        return f"{max(0.0, seconds) * 1000:.3f}"

    return {
        "x-compute-time": ms(now - timings.received),
        "x-total-time": ms(now - timings.received),
        "x-validation-time": ms(timings.validated - timings.received),
        "x-queue-time": ms(admitted - timings.validated),
        "x-inference-time": ms(finished - admitted),
        "x-time-per-token": fine((finished - admitted) / max(1, count)),
        "x-time-to-first-token": fine(first - admitted),
        "x-time-per-output-token": fine((finished - first) / max(1, count - 1)),
        "x-prompt-tokens": str(generation.prompt_tokens),
        "x-generated-tokens": str(count),
        "x-skipped-tokens": "0",
        "x-total-tokens": str(generation.prompt_tokens + count),
    }
