"""The limits of steps and requests, and the errors for requests that exceed them."""

from __future__ import annotations

from dataclasses import dataclass

from engine.errors import (
    AdapterIncompatible,
    AdapterTooLarge,
    ConfigError,
    GenerationError,
    InvalidRequest,
    LoraxError,
)
from engine.kinds import KINDS
from engine.messages import AdapterImageRef, Request


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """Lengths are in tokens."""

    max_rows: int  # sequences that run at one time
    max_step_tokens: int
    max_input_length: int
    max_total_tokens: int
    adapter_cycle_time: float  # seconds
    chunk_tokens: list[int] | None = None  # prompt tokens of a step, by the number of decoding rows
    max_scored_tokens: int | None = None  # prompt tokens of a step that need log-probabilities

    def __post_init__(self) -> None:
        assert self.max_scored_tokens is None or self.max_scored_tokens > 0
        if self.max_step_tokens < self.max_rows:
            raise ConfigError(
                f"a step of {self.max_step_tokens} tokens cannot decode {self.max_rows} sequences",
                field="max_batch_prefill_tokens",
                hint="raise --max-batch-prefill-tokens or lower --max-batch-size",
            )

    def scored_budget(self, budget: int) -> int:
        """The part of a step's token `budget` that prompts with log-probabilities may take."""
        return budget if self.max_scored_tokens is None else min(self.max_scored_tokens, budget)

    def validate(self, request: Request, kv_positions: int) -> None:
        """Raises InvalidRequest for a request that can never be served; `kv_positions`: size of the whole KV cache."""
        length = len(request.tokens)
        if not length:
            raise InvalidRequest(
                "the prompt is empty", field="inputs", hint="send at least one token"
            )
        kind = KINDS[request.kind]
        room_for_output = 1 if kind.generates else 0
        if request.max_new_tokens < room_for_output:
            raise InvalidRequest(
                f"max_new_tokens is {request.max_new_tokens}; the minimum is 1",
                field="max_new_tokens",
                hint="ask for at least one token",
            )
        if kind.pools and request.sampling.prompt_logprobs:
            raise InvalidRequest(
                f"requests of kind {kind.name!r} do not support prompt_logprobs",
                field="prompt_logprobs",
                hint="leave prompt_logprobs out",
            )
        reserved = " (one token is reserved for output)" if room_for_output else ""
        for most, what, remedy in (
            (self.max_input_length, "the limit for prompts is", "raise --max-input-length"),
            (
                self.max_total_tokens - room_for_output,
                f"the limit{reserved} is",
                "raise --max-total-tokens",
            ),
            (
                kv_positions,
                "the KV cache holds",
                "raise --max-batch-total-tokens or give it memory",
            ),
        ):
            if length > most:
                raise InvalidRequest(
                    f"the prompt has {length} tokens, {what} {most}",
                    field="inputs",
                    hint=f"shorten the prompt, or {remedy}",
                )

    def last_length(self, request: Request, kv_positions: int) -> int:
        """Tokens of prompt and output at which the request ends. The last output token needs no KV entry."""
        if not KINDS[request.kind].generates:
            return len(request.tokens)
        requested = len(request.tokens) + request.max_new_tokens
        return min(requested, self.max_total_tokens, kv_positions + 1)


def adapter_too_large(image: AdapterImageRef, arena_bytes: int) -> AdapterTooLarge:
    return AdapterTooLarge(
        f"adapter {image.name or image.digest.hex()} needs {image.data_bytes} bytes and a slot; the arena of "
        f"{arena_bytes} bytes has no room for it next to the preloaded adapters",
        field="adapter_id",
        hint="raise --adapter-memory-fraction or --max-active-adapters, or preload fewer adapters",
    )


def not_finite(adapter: AdapterImageRef | None) -> LoraxError:
    """The error of a request whose logits are infinite or not numbers."""
    if adapter is None:
        return GenerationError(
            "the model's output is not finite", hint="serve it with --dtype bfloat16 or float32"
        )
    return AdapterIncompatible(
        f"the output with {adapter.name} is not finite",
        field="adapter_id",
        hint="check whether its training diverged, and that lora_alpha is right",
    )
