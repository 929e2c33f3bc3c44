"""Launcher flags of LoRAX that have no counterpart here: accepted with a warning, or refused with the reason.

A flag that only tuned something this engine does otherwise *has no effect*, and a deployment that sets it still
starts. A flag whose absence would change what is served is *refused*, unless its value asks for what happens anyway.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from engine.config import flag_of
from engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LegacyFlag:
    """One flag of LoRAX's launcher."""

    flag: str
    why: str
    refused: bool = False
    takes_value: bool = True
    harmless: tuple[str, ...] = ()  # values of a refused flag that ask for what happens anyway
    hint: str | None = None

    @property
    def name(self) -> str:
        return self.flag[2:].replace("-", "_")

    def asks(self, value: Any) -> bool:
        """Whether `value` asks for what this engine does not do."""
        if isinstance(value, bool):
            return value
        return value is not None and str(value).lower() not in self.harmless


def _unused(why: str, *flags: str, takes_value: bool = True) -> list[LegacyFlag]:
    return [LegacyFlag(flag, why, takes_value=takes_value) for flag in flags]


def _refused(flag: str, why: str, **fields: Any) -> LegacyFlag:
    return LegacyFlag(flag, why, refused=True, **fields)


_MIXED_STEPS = "prompt chunks and decode tokens share every step"
_GRAPHS = "nothing is compiled per batch size or rank"
_PIPES = "the processes talk over pipes of their own"
_CORS = "the server allows the methods and headers that it has; see --cors-allow-origin"
_OFF = ("", "0", "false", "no", "off")

LEGACY: tuple[LegacyFlag, ...] = (
    *_unused(
        _MIXED_STEPS,
        "--waiting-served-ratio",
        "--max-waiting-tokens",
        "--eager-prefill",
        "--chunked-prefill",
    ),
    *_unused("tokenising never waits for the engine", "--validation-workers"),
    *_unused(_PIPES, "--shard-uds-path", "--master-addr", "--master-port"),
    *_unused(_GRAPHS, "--compile-max-batch-size", "--compile-max-rank", "--compile-batch-size"),
    *_unused(_CORS, "--cors-allow-header", "--cors-allow-method", "--cors-expose-header"),
    *_unused(_CORS, "--cors-allow-credentials"),
    *_unused("--cuda-memory-fraction is the whole budget", "--memory-wiggle-room"),
    *_unused("--attention-backend says what computes attention", "--backend"),
    *_unused(
        "the device decides which kernels serve", "--disable-custom-kernels", takes_value=False
    ),
    *_unused("one LoRA operator serves every rank", "--disable-sgmv", takes_value=False),
    *_unused("there is no watermark", "--watermark-gamma", "--watermark-delta"),
    *_unused("the source `pbase` is not served", "--predibase-api-token"),
    *_unused("traces are not sent yet", "--otlp-endpoint"),
    *_unused("there is no speculation yet", "--speculation-max-batch-size"),
    *_unused("`/info` shows the environment of a server", "--env", takes_value=False),
    _refused("--num-shard", "one shard is all there is yet", harmless=("", "1")),
    _refused("--sharded", "one shard is all there is yet", harmless=_OFF),
    _refused("--compile", "there is no compiled mode yet", takes_value=False),
    _refused("--speculative-tokens", "there is no speculation yet", harmless=("", "0")),
    _refused(
        "--merge-adapter-weights",
        "adapters are not merged into the base model",
        takes_value=False,
        hint="--adapter-id serves it unmerged, and every other adapter beside it",
    ),
    _refused(
        "--preloaded-adapter-source",
        "preloaded adapters come from --adapter-source",
        hint="set --adapter-source",
    ),
    _refused("--source", "base models come from the hub or a local folder", harmless=("", "hub")),
    _refused(
        "--weights-cache-override",
        "the hub's cache is the only one",
        hint="set --huggingface-hub-cache",
    ),
    _refused("--trust-remote-code", "code from a checkpoint is never run", takes_value=False),
    _refused("--embedding-dim", "embedding heads are not served yet"),
    _refused("--download-only", "launch always serves", takes_value=False),
    _refused("--ngrok", "there is no tunnel", takes_value=False),
    _refused("--ngrok-authtoken", "there is no tunnel"),
    _refused("--ngrok-edge", "there is no tunnel"),
)

# Values that LoRAX's launcher takes for a setting that is here too, and that are not served: setting, value, why.
_CHECKPOINT = "checkpoints that are quantised already are not served yet"
REFUSED_VALUES: dict[str, dict[str, str]] = {
    "quantize": {
        "awq": _CHECKPOINT,
        "gptq": _CHECKPOINT,
        "exl2": _CHECKPOINT,
        "fp8": _CHECKPOINT,
        "fp8-kv": "the KV cache is kept in --dtype",
        "eetq": "bitsandbytes is the one way to 8 bits while weights are read",
        "hqq-4bit": "bitsandbytes is the one way to 4 bits while weights are read",
        "hqq-3bit": "4 bits are the fewest",
        "hqq-2bit": "4 bits are the fewest",
    }
}
_INSTEAD = {"quantize": "bitsandbytes, bitsandbytes-nf4 and bitsandbytes-fp4 are served"}

# Read from the environment too, by the names of LoRAX: those that would change what is served.
_ENVIRONMENT = (
    "NUM_SHARD",
    "SHARDED",
    "SPECULATIVE_TOKENS",
    "MERGE_ADAPTER_WEIGHTS",
    "PRELOADED_ADAPTER_SOURCE",
    "TRUST_REMOTE_CODE",
)


def _check(flag: LegacyFlag, value: Any, where: str) -> Iterator[str]:
    if flag.refused and flag.asks(value):
        raise ConfigError(f"{where}: {flag.why}", field=flag.name, hint=flag.hint)
    if not flag.refused and value is not None:
        yield f"{where} has no effect: {flag.why}"


def _check_value(name: str, value: Any, where: str) -> None:
    why = REFUSED_VALUES[name].get(str(value).lower())
    if why is not None:
        raise ConfigError(f"{where} {value}: {why}", field=name, hint=_INSTEAD[name])


def check_flags(given: Mapping[str, Any]) -> Iterator[str]:
    """One warning for each flag without effect; raises ConfigError for a refused one, or a refused value."""
    for name in REFUSED_VALUES:
        _check_value(name, given.get(name), flag_of(name))
    for flag in LEGACY:
        yield from _check(flag, given.get(flag.name), flag.flag)


def check_environment(environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The same for the variables that would change what is served."""
    environment = os.environ if environment is None else environment
    for name in REFUSED_VALUES:
        _check_value(name, environment.get(name.upper()), name.upper())
    flags = {flag.name.upper(): flag for flag in LEGACY}
    for variable in _ENVIRONMENT:
        value: Any = environment.get(variable)
        if value and not flags[variable].takes_value:
            value = value.lower() not in _OFF
        yield from _check(flags[variable], value, variable)
