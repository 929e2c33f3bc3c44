"""Launcher flags of LoRAX that do not exist here: accepted with a warning, or refused with the reason.

A flag that only tunes performance *has no effect*: a deployment that sets it still starts. A flag that changes what is
served is *refused*, unless its value asks for the behaviour that this engine has anyway.
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
    harmless: tuple[
        str, ...
    ] = ()  # values of a refused flag that match the behaviour of this engine
    hint: str | None = None

    @property
    def name(self) -> str:
        return self.flag[2:].replace("-", "_")

    def asks(self, value: Any) -> bool:
        """Whether `value` asks for behaviour that this engine does not have."""
        if isinstance(value, bool):
            return value
        return value is not None and str(value).lower() not in self.harmless


def _unused(why: str, *flags: str, takes_value: bool = True) -> list[LegacyFlag]:
    return [LegacyFlag(flag, why, takes_value=takes_value) for flag in flags]


def _refused(flag: str, why: str, **fields: Any) -> LegacyFlag:
    return LegacyFlag(flag, why, refused=True, **fields)


_MIXED_STEPS = "every step mixes prompt chunks and decode tokens"
_GRAPHS = "nothing is compiled per batch size or rank"
_TENSOR_PARALLEL = "tensor parallelism is not supported yet"
_SPECULATION = "speculative decoding is not supported yet"
_TUNNEL = "tunnels are not supported"
_PIPES = "processes communicate over pipes"
_CORS = "the server allows all of its methods and headers; see --cors-allow-origin"
_OFF = ("", "0", "false", "no", "off")

LEGACY: tuple[LegacyFlag, ...] = (
    *_unused(
        _MIXED_STEPS,
        "--waiting-served-ratio",
        "--max-waiting-tokens",
        "--eager-prefill",
        "--chunked-prefill",
    ),
    *_unused("tokenization does not wait for the engine", "--validation-workers"),
    *_unused(_PIPES, "--shard-uds-path", "--master-addr", "--master-port"),
    *_unused(_GRAPHS, "--compile-max-batch-size", "--compile-max-rank", "--compile-batch-size"),
    *_unused(_CORS, "--cors-allow-header", "--cors-allow-method", "--cors-expose-header"),
    *_unused(_CORS, "--cors-allow-credentials"),
    *_unused("--cuda-memory-fraction sets the whole budget", "--memory-wiggle-room"),
    *_unused("use --attention-backend", "--backend"),
    *_unused("the device determines the kernels", "--disable-custom-kernels", takes_value=False),
    *_unused("one LoRA kernel serves all ranks", "--disable-sgmv", takes_value=False),
    *_unused("tracing is not supported yet", "--otlp-endpoint"),
    *_unused(_SPECULATION, "--speculation-max-batch-size"),
    *_unused("`/info` describes a running server", "--env", takes_value=False),
    _refused("--num-shard", _TENSOR_PARALLEL, harmless=("", "1")),
    _refused("--sharded", _TENSOR_PARALLEL, harmless=_OFF),
    _refused("--compile", "compilation is not supported yet", takes_value=False),
    _refused("--speculative-tokens", _SPECULATION, harmless=("", "0")),
    _refused(
        "--preloaded-adapter-source",
        "preloaded adapters come from --adapter-source",
        hint="set --adapter-source",
    ),
    _refused(
        "--weights-cache-override",
        "weights are only cached in the hub's cache",
        hint="set --huggingface-hub-cache",
    ),
    _refused("--trust-remote-code", "code from checkpoints never runs", takes_value=False),
    _refused("--embedding-dim", "embedding models are not supported yet"),
    _refused("--download-only", "launch always starts the server", takes_value=False),
    _refused("--ngrok", _TUNNEL, takes_value=False),
    _refused("--ngrok-authtoken", _TUNNEL),
    _refused("--ngrok-edge", _TUNNEL),
)

# Values that LoRAX accepts for a setting that exists here too, but that this engine does not support.
_CHECKPOINT = "quantised checkpoints are not supported yet"
REFUSED_VALUES: dict[str, dict[str, str]] = {  # setting -> value -> why
    "quantize": {
        "awq": _CHECKPOINT,
        "gptq": _CHECKPOINT,
        "exl2": _CHECKPOINT,
        "fp8": _CHECKPOINT,
        "fp8-kv": "the KV cache always has the type of --dtype",
        "eetq": "only bitsandbytes can quantise to 8 bits",
        "hqq-4bit": "only bitsandbytes can quantise to 4 bits",
        "hqq-3bit": "fewer than 4 bits are not supported",
        "hqq-2bit": "fewer than 4 bits are not supported",
    }
}
_INSTEAD = {"quantize": "use bitsandbytes, bitsandbytes-nf4 or bitsandbytes-fp4"}

# LoRAX's environment variables for flags that change what is served.
_ENVIRONMENT = (
    "NUM_SHARD",
    "SHARDED",
    "SPECULATIVE_TOKENS",
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
    """Yields a warning per flag without effect. Raises ConfigError for a refused flag or value."""
    for name in REFUSED_VALUES:
        _check_value(name, given.get(name), flag_of(name))
    for flag in LEGACY:
        yield from _check(flag, given.get(flag.name), flag.flag)


def check_environment(environment: Mapping[str, str] | None = None) -> Iterator[str]:
    """The same for environment variables that change what is served."""
    environment = os.environ if environment is None else environment
    for name in REFUSED_VALUES:
        _check_value(name, environment.get(name.upper()), name.upper())
    flags = {flag.name.upper(): flag for flag in LEGACY}
    for variable in _ENVIRONMENT:
        value: Any = environment.get(variable)
        if value and not flags[variable].takes_value:
            value = value.lower() not in _OFF
        yield from _check(flags[variable], value, variable)
