"""All settings: one frozen dataclass per concern, each field with its help text.

Flags, environment variables, YAML keys, defaults and the table in docs/configuration.md are derived from these fields
(`engine.settings`). A field `max_total_tokens` is the flag `--max-total-tokens`, the variable `MAX_TOTAL_TOKENS` (the
names of LoRAX) and the YAML key `max_total_tokens`. `None` means that the engine chooses a value; it is in the
platform, the model spec or the memory plan, never in the config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

MIB, GIB = 1 << 20, 1 << 30  # bytes


@dataclass(frozen=True, slots=True)
class Option:
    """The user's view of one field."""

    help: str
    env: tuple[str, ...] = ()  # further environment variables, read after FIELD_NAME
    env_name: str | None = None  # replaces FIELD_NAME if that name has another meaning
    secret: bool = False  # never printed; the field also needs repr=False
    least: float | None = None  # lower bound of a number
    most: float | None = None  # upper bound


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Base model."""

    model_id: Annotated[
        str,
        Option(
            "Base model: `demo`, a local folder, or a hub id. `id@revision` also sets the revision. "
            "`s3://bucket/folder` is downloaded at start."
        ),
    ] = "demo"
    source: Annotated[
        str,
        Option(
            "Source of the base model: hub, local, s3, https or one of --adapter-schemes. "
            "An id with a source's prefix, such as s3://, needs none."
        ),
    ] = "hub"
    revision: Annotated[str | None, Option("Revision of the base model on the hub.")] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        Option(
            "Data type of weights and KV cache. auto: float32 on a CPU, the checkpoint's type on a GPU."
        ),
    ] = "auto"
    quantize: Annotated[
        Literal["bitsandbytes", "bitsandbytes-nf4", "bitsandbytes-fp4"] | None,
        Option(
            "Quantise linear layers at load time to 8 bits, or to 4 bits (NF4, FP4). Saves memory, costs accuracy. "
            "Adapters, embedding and head keep --dtype. Needs the package bitsandbytes."
        ),
    ] = None
    load_format: Annotated[
        Literal["safetensors", "dummy"],
        Option(
            "Source of the weights. safetensors: the checkpoint (a .bin is converted first). dummy: random weights."
        ),
    ] = "safetensors"
    tokenizer_config_path: Annotated[
        str | None,
        Option("Path of a tokenizer_config.json. Its chat template replaces the model's."),
    ] = None
    huggingface_hub_cache: Annotated[
        str | None, Option("Folder for downloaded models and adapters.", env=("HF_HUB_CACHE",))
    ] = None
    hub_token: Annotated[
        str | None,
        Option(
            "Hub token, for private models and adapters.",
            env=("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"),
            secret=True,
        ),
    ] = field(default=None, repr=False)


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """Adapters."""

    adapter_id: Annotated[
        str | None,
        Option(
            "Default adapter for requests without one. The base model is then available as `base`."
        ),
    ] = None
    merge_adapter_weights: Annotated[
        bool,
        Option(
            "Merge --adapter-id into the weights of the base model at start. It then costs nothing, and no other "
            "adapter is served, nor the base model without it."
        ),
    ] = False
    adapter_source: Annotated[
        str, Option("Source of --adapter-id and --preloaded-adapter-ids: hub, local, s3 or pbase.")
    ] = "hub"
    default_adapter_source: Annotated[
        str | None,
        Option(
            "Source of adapters in requests that name no source: hub, local, s3 or pbase. Unset: --adapter-source."
        ),
    ] = None
    preloaded_adapter_ids: Annotated[
        tuple[str, ...], Option("Adapter to load at start and never evict. Repeat for more.")
    ] = ()
    adapter_alias: Annotated[
        tuple[str, ...],
        Option("name=adapter: the name stands for the adapter. Repeat for more."),
    ] = ()
    adapter_root: Annotated[
        tuple[str, ...],
        Option("Folder from which local adapters may be read. Repeat for more."),
    ] = (".",)
    max_active_adapters: Annotated[
        int,
        Option(
            "Maximum adapters on the device at the same time, if they fit in memory. Higher: fewer reloads.",
            least=1,
        ),
    ] = 1024
    max_requests_per_adapter: Annotated[
        int | None,
        Option(
            "Maximum open requests for one adapter. Further ones get status 429. Unset: no limit.",
            least=1,
        ),
    ] = None
    max_added_tokens: Annotated[
        int,
        Option(
            "Tokens that an adapter may add to the base model's vocabulary, with rows of its own in embedding and "
            "head. Higher: more memory for logits.",
            least=0,
        ),
    ] = 256
    adapter_cycle_time_s: Annotated[
        float,
        Option(
            "Seconds that a request waits for room on the device before other adapters are drained to make room. "
            "Lower: adapters take turns sooner. Higher: fewer reloads.",
            least=0,
        ),
    ] = 2.0
    adapter_load_timeout_s: Annotated[
        float,
        Option(
            "Maximum seconds to bring an adapter from its source to host memory. Then the requests for it fail.",
            least=0.1,
        ),
    ] = 300.0
    adapter_memory_fraction: Annotated[
        float,
        Option(
            "Fraction of the device memory budget for adapters. Higher: more adapters stay on the device, but the "
            "KV cache is smaller."
        ),
    ] = 0.1
    host_cache_gb: Annotated[
        float | None,
        Option(
            "GiB of host memory to cache adapters. Higher: fewer reloads from disk or hub. Unset: a quarter of free "
            "memory, at most 4.",
            least=0,
        ),
    ] = None
    adapter_disk_cache_gb: Annotated[
        float,
        Option(
            "GiB of disk for adapters downloaded from sources other than the hub, and for converted .bin files. "
            "The least recently used are removed. Higher: fewer downloads. 0: no limit.",
            least=0,
        ),
    ] = 50.0
    s3_endpoint_url: Annotated[
        str | None,
        Option(
            "Address of an S3-compatible store, such as https://ACCOUNT.r2.cloudflarestorage.com. Unset: AWS.",
            env=("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"),
        ),
    ] = None
    adapter_hosts: Annotated[
        tuple[str, ...],
        Option(
            "Web server from which adapters may be read (https://HOST/folder): HOST or HOST:PORT. Repeat for more. "
            "Unset: none. Only a host given as an IP address may be private."
        ),
    ] = ()
    adapter_schemes: Annotated[
        tuple[str, ...],
        Option(
            "Further store from which adapters may be read through fsspec, such as gs or abfs. Repeat for more. "
            "Needs the store's package. Unset: none."
        ),
    ] = ()
    predibase_gateway_endpoint: Annotated[
        str, Option("Address of Predibase's API, for adapters of the source pbase.")
    ] = "https://api.app.predibase.com"
    predibase_api_token: Annotated[
        str | None, Option("Predibase token, for requests without an api_token.", secret=True)
    ] = field(default=None, repr=False)
    predibase_model_bucket: Annotated[
        str | None,
        Option(
            "S3 bucket of Predibase's adapters. Unset: the first part of the path that its API returns."
        ),
    ] = None
    max_adapter_rank: Annotated[
        int, Option("Maximum rank of an adapter. Adapters of higher rank are refused.", least=1)
    ] = 256


@dataclass(frozen=True, slots=True)
class SchedulerConfig:
    """Batching."""

    max_batch_size: Annotated[
        int | None,
        Option(
            "Maximum sequences per step. Higher: more throughput. Lower: less memory. Unset: 256 on a GPU, 64 on a CPU."
        ),
    ] = None
    max_batch_prefill_tokens: Annotated[
        int | None,
        Option(
            "Maximum tokens per step, decode tokens and prompt chunks together. Higher: faster prompts, more memory. "
            "Unset: 8192 on a GPU, 128 on a CPU."
        ),
    ] = None
    max_chunk_tokens: Annotated[
        int | None,
        Option(
            "Prompt tokens per step while other requests decode. Lower: smoother streams. Higher: faster prompts. "
            "Raised automatically when prompts fall behind; on a GPU, lowered if that keeps the step at 256 tokens. "
            "Unset: 128 on a GPU, no limit on a CPU."
        ),
    ] = None
    max_batch_total_tokens: Annotated[
        int | None,
        Option(
            "Maximum tokens in the KV cache. Lower: fewer concurrent requests. Unset: as many as fit in memory."
        ),
    ] = None
    max_input_length: Annotated[
        int | None, Option("Maximum prompt length in tokens. Unset: --max-total-tokens - 1.")
    ] = None
    max_total_tokens: Annotated[
        int | None,
        Option(
            "Maximum tokens per request, prompt and output. Unset: the model's limit, at most 4096."
        ),
    ] = None
    prefix_caching: Annotated[bool, Option("Reuse the KV cache of common prompt prefixes.")] = True
    block_size: Annotated[
        int | None, Option("Tokens per KV cache block. Unset: the attention backend's default.")
    ] = None


@dataclass(frozen=True, slots=True)
class MemoryConfig:
    """Device and memory."""

    device: Annotated[
        Literal["auto", "cpu", "cuda"],
        Option(
            "Device to run on. auto: a GPU if torch finds one, else the CPU.",
            env_name="LORAX_DEVICE",
        ),
    ] = "auto"
    cuda_memory_fraction: Annotated[
        float,
        Option(
            "Fraction of the GPU's memory to use. Higher: larger KV cache. Lower: room for other programs."
        ),
    ] = 0.9
    eager: Annotated[bool, Option("Run without CUDA graphs. Slower; for debugging.")] = False
    attention_backend: Annotated[
        Literal["auto", "builtin", "flashinfer", "flash-attn"],
        Option(
            "Attention kernels on a GPU. flashinfer and flash-attn need their packages. auto: builtin."
        ),
    ] = "auto"
    slow_reference: Annotated[
        bool, Option("Run on a GPU without the CUDA extension. Many times slower.")
    ] = False
    cpu_memory_gb: Annotated[
        float | None,
        Option(
            "GiB for KV cache and adapters on a CPU. Unset: a quarter of free memory, at most 4."
        ),
    ] = None
    num_threads: Annotated[
        int | None, Option("Threads of the engine on a CPU. Unset: one per core.", least=1)
    ] = None


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """HTTP server."""

    # Shells and containers set HOSTNAME to the name of the machine.
    hostname: Annotated[str, Option("Address to listen on.", env_name="LORAX_HOSTNAME")] = "0.0.0.0"
    port: Annotated[int, Option("Port to listen on. 0: any free port.", least=0, most=65535)] = 3000
    max_concurrent_requests: Annotated[
        int, Option("Maximum open requests. Further requests get status 429.", least=1)
    ] = 1024
    client_header_timeout_s: Annotated[
        float, Option("Maximum seconds for the headers of a request to arrive.", least=0.1)
    ] = 60.0
    client_body_timeout_s: Annotated[
        float, Option("Maximum seconds for its body. Then the status is 408.", least=0.1)
    ] = 60.0
    drain_timeout_s: Annotated[
        float,
        Option(
            "Maximum seconds for open requests to finish after SIGTERM. Then they are cancelled.",
            least=0,
        ),
    ] = 90.0
    max_best_of: Annotated[int, Option("Maximum `best_of` of a request.", least=1)] = 2
    max_n: Annotated[int, Option("Maximum `n` of a request.", least=1)] = 128
    completion_max_tokens: Annotated[
        int | None,
        Option("`max_tokens` of a completion without one; OpenAI's API has 16.", least=1),
    ] = None
    watermark_gamma: Annotated[
        float,
        Option("Fraction of the vocabulary that `watermark` favours.", least=0.01, most=0.99),
    ] = 0.5
    watermark_delta: Annotated[float, Option("Added to their logits.", least=0, most=100)] = 2.0
    max_stop_sequences: Annotated[int, Option("Maximum stop sequences of a request.", least=0)] = 4
    max_num_alternatives: Annotated[
        int, Option("Maximum `top_logprobs` of a request.", least=0)
    ] = 20
    tool_call_parser: Annotated[
        Literal["auto", "mistral", "qwen3_coder", "granite", "hermes", "llama3_json", "pythonic"],
        Option("Format of tool calls in answers. auto: that of the chat template in use."),
    ] = "auto"
    api_key: Annotated[
        tuple[str, ...],
        Option(
            "API key of the tenant `default`. Repeat for more. With keys, every route but /health needs one.",
            env_name="LORAX_API_KEY",
            secret=True,
        ),
    ] = field(default=(), repr=False)
    api_keys_file: Annotated[
        str | None,
        Option(
            "YAML file of API keys: a list of name, key or sha256, priority, weight, admin. Read again when it changes."
        ),
    ] = None
    prefix_cache_per_tenant: Annotated[
        bool,
        Option(
            "Share cached prompts only among requests of one tenant, also for the base model and public adapters. "
            "Needs API keys."
        ),
    ] = False
    cors_allow_origin: Annotated[
        tuple[str, ...],
        Option(
            "Origin whose pages may call the server from a browser, or * for all. Repeat for more. Unset: none."
        ),
    ] = ()
    request_logger_url: Annotated[
        str | None,
        Option(
            "Gets a POST with the texts of each answered request, as LoRAX sends it.", secret=True
        ),
    ] = field(default=None, repr=False)
    json_output: Annotated[bool, Option("Log one JSON object per line.")] = False
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"], Option("Minimum level of log messages.")
    ] = "info"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All settings, one attribute per concern."""

    model: ModelConfig = field(default_factory=ModelConfig)
    adapters: AdapterConfig = field(default_factory=AdapterConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    server: ServerConfig = field(default_factory=ServerConfig)


def flag_of(name: str) -> str:
    """`--max-total-tokens` of `max_total_tokens`."""
    return "--" + name.replace("_", "-")
