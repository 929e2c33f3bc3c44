"""What the user wants: one frozen dataclass per concern, each field with its help text.

Flags, environment names, YAML keys, defaults and the table in docs/configuration.md are derived from these fields;
nothing else in the project reads the environment. A field `max_total_tokens` is the flag `--max-total-tokens`, the
variable `MAX_TOTAL_TOKENS` (the names of LoRAX) and the YAML key `max_total_tokens`. `None` means that the engine
decides; what it decides goes into the platform, the model spec and the memory plan, never back into the config.
"""

from __future__ import annotations

import dataclasses
import math
import os
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from engine.errors import ConfigError

MIB, GIB = 1 << 20, 1 << 30  # bytes


@dataclass(frozen=True, slots=True)
class Option:
    """How one field meets the user."""

    help: str
    env: tuple[str, ...] = ()  # further environment names, tried after FIELD_NAME
    env_name: str | None = None  # instead of FIELD_NAME, where that name already means something
    secret: bool = False  # never printed
    least: float | None = None  # of a number
    most: float | None = None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The base model."""

    model_id: Annotated[
        str, Option("Base model: `demo`, a local folder, or a hub id, optionally `id@revision`.")
    ] = "demo"
    revision: Annotated[str | None, Option("Revision of the base model on the hub.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option("Precision of weights and KV cache; auto: float32 on a CPU, else the checkpoint's."),
    ] = "auto"
    quantize: Annotated[
        Literal["bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4"] | None,
        Option(
            "Quantise the linears while they are read: to 8 bits, or to 4 bits as NF4 or FP4; adapters, embedding and"
            " head stay in --dtype. Needs the package bitsandbytes."
        ),
    ] = None
    load_format: Annotated[
        Literal["safetensors", "dummy"],
        Option(
            "Where weights come from. safetensors: the checkpoint; a .bin is converted first. dummy: random weights."
        ),
    ] = "safetensors"
    tokenizer_config_path: Annotated[
        str | None, Option("A tokenizer_config.json whose chat template replaces the model's.")
    ] = None
    huggingface_hub_cache: Annotated[
        str | None, Option("Folder of downloaded models and adapters.", env=("HF_HUB_CACHE",))
    ] = None
    hub_token: Annotated[
        str | None,
        Option(
            "Token for private models and adapters on the hub.",
            env=("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"),
            secret=True,
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Where adapters come from and how much room they have."""

    adapter_id: Annotated[
        str | None, Option("Adapter of every request that names none; the base is then `base`.")
    ] = None
    adapter_source: Annotated[
        Literal["hub", "local"], Option("Source of --adapter-id and of preloaded adapters.")
    ] = "hub"
    default_adapter_source: Annotated[
        Literal["hub", "local"] | None,
        Option("Source of adapters whose request names none; unset: as --adapter-source."),
    ] = None
    preloaded_adapter_ids: Annotated[
        tuple[str, ...], Option("Adapter to load and pin at start; repeat for more.")
    ] = ()
    adapter_root: Annotated[
        tuple[str, ...],
        Option("Folder that local adapters may be read from; repeat for more. Default: `.`."),
    ] = (".",)
    max_active_adapters: Annotated[
        int, Option("Most adapters on the device at one time (slots).", least=1)
    ] = 1024
    adapter_cycle_time_s: Annotated[
        float,
        Option(
            "Seconds a request waits for room before the longest idle adapter must give way.",
            least=0,
        ),
    ] = 2.0
    adapter_load_timeout_s: Annotated[
        float,
        Option(
            "Seconds that one adapter may take from its source to host memory. Requests that wait for it then fail.",
            least=0.1,
        ),
    ] = 300.0
    adapter_memory_fraction: Annotated[
        float, Option("Share of the device memory budget that holds adapters.")
    ] = 0.1
    host_cache_gb: Annotated[
        float | None,
        Option(
            "GiB of host memory that holds adapters ready to be placed; unset: by memory.", least=0
        ),
    ] = None
    max_adapter_rank: Annotated[int, Option("Adapters of a larger rank are refused.", least=1)] = (
        256
    )


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """What one step may hold."""

    max_batch_size: Annotated[
        int | None, Option("Most sequences in one step; unset: 256 on a GPU, 64 on a CPU.")
    ] = None
    max_batch_prefill_tokens: Annotated[
        int | None,
        Option("Most tokens in one step: decode tokens, then prompt chunks; unset: by platform."),
    ] = None
    max_chunk_tokens: Annotated[
        int | None,
        Option(
            "Most prompt tokens in a step in which other requests decode: less lets their tokens flow more evenly, "
            "more computes prompts sooner. Where more requests wait for their first token than decode, or prompts have "
            "lacked room for a quarter of a second, it is in proportion more. Unset: 128 on a GPU, "
            "else no limit. On a GPU, less where that keeps the step at 256 tokens."
        ),
    ] = None
    max_batch_total_tokens: Annotated[
        int | None, Option("Most tokens in the KV cache; can only lower what memory allows.")
    ] = None
    max_input_length: Annotated[
        int | None, Option("Longest prompt, in tokens; unset: --max-total-tokens - 1.")
    ] = None
    max_total_tokens: Annotated[
        int | None, Option("Most tokens of prompt and output; unset: min(model's limit, 4096).")
    ] = None
    prefix_caching: Annotated[bool, Option("Reuse the KV cache of equal prompt beginnings.")] = True
    block_size: Annotated[
        int | None, Option("Positions in one KV block; unset: what the attention backend likes.")
    ] = None


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """How much of the machine the engine takes."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Option(
            "Where the model runs; auto: on the GPU where torch sees one.",
            env_name="LORAX_DEVICE",
        ),
    ] = "auto"
    cuda_memory_fraction: Annotated[float, Option("Share of the GPU's memory to use.")] = 0.9
    eager: Annotated[
        bool, Option("Launch every kernel by itself on a GPU, without CUDA graphs; for debugging.")
    ] = False
    attention_backend: Annotated[
        Literal["auto", "builtin", "flashinfer", "flash-attn"],
        Option("Who computes attention on a GPU; the others are packages; auto: our own kernels."),
    ] = "auto"
    slow_reference: Annotated[
        bool, Option("Run on a GPU without the CUDA extension, on ops that are many times slower.")
    ] = False
    cpu_memory_gb: Annotated[
        float | None,
        Option(
            "GiB for KV cache and adapters on a CPU; unset: a quarter of what is free, 4 at most."
        ),
    ] = None
    num_threads: Annotated[
        int | None, Option("Threads of the compute process on a CPU; unset: one per core.", least=1)
    ] = None


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The HTTP front."""

    # Shells and containers set HOSTNAME to the machine's own name.
    hostname: Annotated[str, Option("Address to listen on.", env_name="LORAX_HOSTNAME")] = "0.0.0.0"
    port: Annotated[int, Option("Port to listen on; 0: any free one.", least=0, most=65535)] = 3000
    max_concurrent_requests: Annotated[
        int, Option("Open requests beyond which new ones are answered with 429.", least=1)
    ] = 1024
    client_header_timeout_s: Annotated[
        float,
        Option(
            "Seconds a client may take to send the headers of a request. Then the connection is closed.",
            least=0.1,
        ),
    ] = 60.0
    client_body_timeout_s: Annotated[
        float,
        Option(
            "Seconds a client may take to send the body of a request. Then the answer is 408.",
            least=0.1,
        ),
    ] = 60.0
    drain_timeout_s: Annotated[
        float,
        Option(
            "Seconds that open requests get to finish after SIGTERM. Then they are cancelled.",
            least=0,
        ),
    ] = 90.0
    max_best_of: Annotated[int, Option("Largest `best_of` (and `n`) of a request.", least=1)] = 2
    max_stop_sequences: Annotated[int, Option("Most stop sequences of a request.", least=0)] = 4
    max_num_alternatives: Annotated[
        int, Option("Most alternative tokens (`top_logprobs`) of a request.", least=0)
    ] = 20
    cors_allow_origin: Annotated[
        tuple[str, ...], Option("Origin that browsers may call from; repeat; unset: any.")
    ] = ()
    json_output: Annotated[bool, Option("Log one JSON object a line.")] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Option("Least level that is logged.")
    ] = "info"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything, one attribute per concern."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


def flag_of(name: str) -> str:
    """`--max-total-tokens` of `max_total_tokens`."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True, slots=True)
class Setting:
    """One field, resolved: what flags, environment, YAML and docs are made from."""

    concern: str  # attribute of EngineConfig
    name: str  # max_total_tokens
    type: Any  # without Annotated and None
    default: Any
    option: Option

    @property
    def flag(self) -> str:
        return flag_of(self.name)

    @property
    def environment(self) -> tuple[str, ...]:
        return (self.option.env_name or self.name.upper(), *self.option.env)

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.type) if get_origin(self.type) is Literal else ()

    @property
    def repeated(self) -> bool:
        return get_origin(self.type) is tuple


def _bare(annotation: Any) -> tuple[Any, Option]:
    bare, option = get_args(annotation)[:2]
    if get_origin(bare) in (Union, types.UnionType):
        (bare,) = (arg for arg in get_args(bare) if arg is not type(None))
    return bare, option


def settings() -> Iterator[Setting]:
    """Every setting in the order of the concerns and their fields."""
    concerns = get_type_hints(EngineConfig)
    for concern, cls in concerns.items():
        hints = get_type_hints(cls, include_extras=True)
        for entry in dataclasses.fields(cls):
            bare, option = _bare(hints[entry.name])
            yield Setting(concern, entry.name, bare, entry.default, option)


def _parse(setting: Setting, value: Any, where: str) -> Any:
    """`value` (text, or what YAML made of it) as the setting's type."""
    try:
        if value is None:
            return setting.default
        if setting.repeated:
            items = value.split(",") if isinstance(value, str) else list(value)
            return tuple(str(item) for item in items if str(item))
        if setting.choices:
            if str(value) not in setting.choices:
                raise ValueError(f"must be one of {', '.join(setting.choices)}")
            return str(value)
        if setting.type is bool:
            words = {"1": True, "true": True, "yes": True, "on": True}
            words |= {"0": False, "false": False, "no": False, "off": False}
            return words[str(value).lower()]
        found = setting.type(value)
        if setting.type in (int, float):
            _check_range(setting, found, where)
        return found
    except (KeyError, OverflowError, TypeError, ValueError) as error:
        message = str(error) if setting.choices else f"is not a valid {setting.type.__name__}"
        raise ConfigError(f"{where}: {value!r} {message}", field=setting.name) from None


def _check_range(setting: Setting, value: float, where: str) -> None:
    least, most = setting.option.least, setting.option.most
    if (
        math.isfinite(value)
        and (least is None or value >= least)
        and (most is None or value <= most)
    ):
        return
    wanted = " and ".join(
        f"at {kind} {bound:g}"
        for kind, bound in (("least", least), ("most", most))
        if bound is not None
    )
    raise ConfigError(f"{where} is {value}, not {wanted or 'a number'}", field=setting.name)


def resolve(
    given: Mapping[str, Any],
    environment: Mapping[str, str] | None = None,
    file: Path | None = None,
) -> EngineConfig:
    """Flags in `given` (None: not given) before environment before YAML file before default.

    Raises ConfigError that names the flag, the variable or the key.
    """
    environment = os.environ if environment is None else environment
    known = {setting.name: setting for setting in settings()}
    in_file: dict[str, Any] = {}
    if file is not None:
        try:
            in_file = yaml.safe_load(file.read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ConfigError(f"cannot read {file}: {error}", field="config") from None
        if not isinstance(in_file, dict):
            raise ConfigError(f"{file} is not a mapping of settings", field="config")
        in_file = {str(key).replace("-", "_"): value for key, value in in_file.items()}
        if unknown := sorted(in_file.keys() - known.keys()):
            raise ConfigError(f"{file}: unknown setting {unknown[0]!r}", field=unknown[0])
    values: dict[str, dict[str, Any]] = {}
    for name, setting in known.items():
        found = next((key for key in setting.environment if environment.get(key)), None)
        if given.get(name) is not None:
            value = _parse(setting, given[name], setting.flag)
        elif found:
            value = _parse(setting, environment[found], found)
        elif name in in_file:
            value = _parse(setting, in_file[name], f"{file}: {name}")
        else:
            continue
        values.setdefault(setting.concern, {})[name] = value
    hints = get_type_hints(EngineConfig)
    return EngineConfig(**{concern: hints[concern](**kept) for concern, kept in values.items()})
