"""One line in the log for each request that generates."""

from __future__ import annotations

import json
import logging
import re

from engine.server.generation import Generation

log = logging.getLogger(__name__)

MAX_VALUE = 200  # characters
PLAIN = re.compile(r"[\w./:@,-]+", re.ASCII)

Fields = dict[str, str | int | float]


def log_request(
    route: str, tenant: str, generation: Generation | None, failed: str | None, seconds: float
) -> None:
    """`failed`: type of the error, or None. `seconds`: from the end of the body to the end of the answer."""
    if not log.isEnabledFor(logging.INFO):
        return
    fields: Fields = {"route": route}
    if tenant:
        fields["tenant"] = tenant[:MAX_VALUE]
    if generation is not None:
        fields |= _of(generation)
    fields["total_ms"] = _ms(seconds)
    if failed is not None:
        fields["error"] = failed
    shown = " ".join(f"{name}={_shown(value)}" for name, value in fields.items())
    log.info("request %s", shown, extra={"fields": fields})


def _of(generation: Generation) -> Fields:
    adapter, timings = generation.parameters.adapter, generation.timings
    if generation.is_private:
        name = "private"
    else:
        name = "base" if adapter is None else adapter.name[:MAX_VALUE]
    fields: Fields = {
        "id": generation.id,
        "adapter": name,
        "tokens_in": generation.prompt_tokens,
        "cached_tokens": generation.cached_tokens,
        "tokens_out": generation.generated_tokens,
    }
    if timings.admitted is not None:
        fields["queue_ms"] = _ms(timings.admitted - timings.validated)
    if timings.first_token is not None:
        fields["first_token_ms"] = _ms(timings.first_token - timings.received)
    reasons = {finish.reason: None for _, finish in sorted(generation.finished.items())}
    if reasons:
        fields["finish"] = ",".join(reasons)
    return fields


def _ms(seconds: float) -> float:
    return round(max(0.0, seconds) * 1000, 1)


def _shown(value: str | float) -> str:
    """As it is, or quoted with escapes for spaces, control characters and everything beyond ASCII."""
    text = str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)
