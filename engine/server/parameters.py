"""The parameters of a generation, independent of the response format, and their limits.

Formats map their own field names to `Parameters`. `names` maps them back, so that an error has the name that the client
used.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engine.adapters.ref import AdapterRef
from engine.config import EngineConfig
from engine.errors import InvalidRequest
from engine.messages import EngineInfo, SamplingParams

BASE_NAMES = ("base", "__base_model__")  # adapter names that mean: no adapter
GREEDY_BELOW = 1e-5  # lower temperatures mean greedy: dividing by them would overflow
LEAST, MOST = (
    1e-30,
    1e30,
)  # factors beyond change nothing more, and the engine's 32 bits cannot hold all of them
MAX_SEED = 2**64 - 1
MAX_TOP_K = 2**31 - 1
LOWEST_PRIORITY = -1000
MAX_CACHE_SALT = 256  # characters


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of this server, and the strength of its watermark."""

    max_input_length: int
    max_total_tokens: int
    vocab_size: int
    max_best_of: int
    max_n: int
    max_stop_sequences: int
    max_num_alternatives: int
    max_sequences: int  # of one request: prompts x choices
    watermark_gamma: float = 0.5
    watermark_delta: float = 2.0

    @classmethod
    def of(cls, info: EngineInfo, config: EngineConfig) -> Limits:
        return cls(
            max_input_length=info.max_input_length,
            max_total_tokens=info.max_total_tokens,
            vocab_size=info.vocab_size,
            max_best_of=config.server.max_best_of,
            max_n=config.server.max_n,
            max_stop_sequences=config.server.max_stop_sequences,
            max_num_alternatives=config.server.max_num_alternatives,
            max_sequences=config.server.max_concurrent_requests,
            watermark_gamma=config.server.watermark_gamma,
            watermark_delta=config.server.watermark_delta,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters:
    """One request's parameters. None: not given."""

    adapter: AdapterRef | None = None  # None: the base model
    api_token: str | None = None
    cache_salt: str | None = None  # only requests with the same one share cached prompts
    priority: int | None = None  # higher: before others; at most the tenant's
    sample: bool = False  # else greedy
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    typical_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    max_new_tokens: int | None = None  # None: as many as fit
    min_new_tokens: int | None = None  # before these, nothing but `max_new_tokens` ends the output
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()  # they end the output as end-of-sequence tokens do
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # token -> added to its logit
    watermark: bool = False
    grammar: str | None = None  # llguidance's, for the whole output; see `engine.grammar`
    keep_stop: bool = False  # the text includes the stop sequence
    ignore_eos: bool = False
    truncate: int | None = None  # keep this many of the prompt's last tokens
    best_of: int = 1  # choices to generate for each prompt
    logprobs: bool = False
    num_alternatives: int | None = None
    prompt_logprobs: bool = False
    score_only: bool = (
        False  # only the prompt is answered with: `max_new_tokens` is 1, and that token is dropped
    )
    special: bool = True  # add special tokens (BOS) to a prompt that is a text
    names: Mapping[str, str] = field(
        default_factory=dict
    )  # field -> its name in the client's format

    def name(self, what: str) -> str:
        return self.names.get(what, what)

    @property
    def greedy(self) -> bool:
        return not self.sample or (self.temperature is not None and self.temperature < GREEDY_BELOW)

    def ends(self, eos_token_ids: Sequence[int]) -> list[int]:
        """The tokens that end the output. `eos_token_ids`: of the model or the adapter."""
        found = () if self.ignore_eos else eos_token_ids
        return list(dict.fromkeys([*found, *self.stop_token_ids]))

    def sampling(self, seed: int, limits: Limits, ends: Sequence[int] = ()) -> SamplingParams:
        """For the engine, with the `seed` of one choice; `ends` are the tokens that end the output."""
        off = self.greedy
        return SamplingParams(
            temperature=0.0 if off else min(_or(self.temperature, 1.0), MOST),
            top_k=0 if off else max(0, min(self.top_k or 0, limits.vocab_size)),
            top_p=1.0 if off else _or(self.top_p, 1.0),
            typical_p=1.0 if off else _or(self.typical_p, 1.0),
            min_p=0.0 if off else _or(self.min_p, 0.0),
            repetition_penalty=min(max(_or(self.repetition_penalty, 1.0), LEAST), MOST),
            frequency_penalty=_or(self.frequency_penalty, 0.0),
            presence_penalty=_or(self.presence_penalty, 0.0),
            seed=_signed(seed),
            logprobs=self.logprobs or self.prompt_logprobs,
            num_alternatives=self.num_alternatives or 0,
            prompt_logprobs=self.prompt_logprobs,
            logit_bias=dict(self.logit_bias),
            min_tokens=self.min_new_tokens or 0,
            delayed=tuple(ends) if self.min_new_tokens else (),
            watermark_gamma=limits.watermark_gamma if self.watermark else 0.0,
            watermark_delta=limits.watermark_delta if self.watermark else 0.0,
        )

    def seeds(self) -> list[int]:
        """One for each of `best_of` choices: the client's seed or a random one, then seeds derived from it."""
        first = random.getrandbits(63) if self.seed is None else self.seed & MAX_SEED
        return [first, *(_mix(first, index) for index in range(1, self.best_of))]


def priority_of(parameters: Parameters, most: int) -> int:
    """The priority of a request. `most`: the tenant's, or 0. Raises InvalidRequest."""
    asked = parameters.priority
    if asked is not None and not LOWEST_PRIORITY <= asked <= most:
        raise invalid(
            parameters.name("priority"),
            f"must be between {LOWEST_PRIORITY} and {most}, not {asked}",
            "leave it out for the highest that you may have",
        )
    return most if asked is None else asked


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _signed(seed: int) -> int:
    """All 64 bits of `seed`, as a signed number."""
    return (seed & MAX_SEED ^ 2**63) - 2**63


def _mix(seed: int, index: int) -> int:
    """SplitMix64 (Steele et al. 2014): the `index`-th number after `seed`."""
    z = (seed + index * 0x9E3779B97F4A7C15) & MAX_SEED
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MAX_SEED
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MAX_SEED
    return (z ^ (z >> 31)) & MAX_SEED


_Check = tuple[str, Callable[[Any], bool], str, str | None]
_CHECKS: tuple[_Check, ...] = (
    ("temperature", lambda v: v >= 0, "must be 0 or more", "0 is greedy"),
    (
        "top_k",
        lambda v: -1 <= v <= MAX_TOP_K,
        f"must be between 0 and {MAX_TOP_K}",
        "0 disables it",
    ),
    ("top_p", lambda v: 0 < v <= 1, "must be above 0 and at most 1", None),
    ("typical_p", lambda v: 0 < v <= 1, "must be above 0 and at most 1", "1 disables it"),
    ("min_p", lambda v: 0 <= v <= 1, "must be between 0 and 1", "0 disables it"),
    ("repetition_penalty", lambda v: v > 0, "must be above 0", "1 disables it"),
    ("frequency_penalty", lambda v: -2 <= v <= 2, "must be between -2 and 2", "0 disables it"),
    ("presence_penalty", lambda v: -2 <= v <= 2, "must be between -2 and 2", "0 disables it"),
    ("max_new_tokens", lambda v: v > 0, "must be 1 or more", "leave it out for as many as fit"),
    ("min_new_tokens", lambda v: v >= 0, "must be 0 or more", "leave it out for none"),
    ("best_of", lambda v: v > 0, "must be 1 or more", None),
)


def check(parameters: Parameters, limits: Limits) -> None:
    """Checks all limits that do not depend on a prompt; raises InvalidRequest."""
    for what, allowed, rule, hint in _CHECKS:
        value = getattr(parameters, what)
        if value is not None and not allowed(value):
            raise invalid(parameters.name(what), f"{rule}, not {value}", hint)
    if parameters.name("best_of") == "n":
        _check_most(parameters, "best_of", limits.max_n, "--max-n")
    else:
        _check_most(parameters, "best_of", limits.max_best_of, "--max-best-of")
    alternatives = parameters.num_alternatives
    if alternatives is not None and alternatives < 0:
        raise invalid(parameters.name("num_alternatives"), f"must be 0 or more, not {alternatives}")
    _check_most(
        parameters, "num_alternatives", limits.max_num_alternatives, "--max-num-alternatives"
    )
    if parameters.seed is not None and not -(2**63) <= parameters.seed <= MAX_SEED:
        raise invalid(parameters.name("seed"), "must fit in 64 bits")
    salt = parameters.cache_salt
    if salt is not None and not 1 <= len(salt) <= MAX_CACHE_SALT:
        raise invalid(
            parameters.name("cache_salt"),
            f"must have 1 to {MAX_CACHE_SALT} characters, not {len(salt)}",
            "leave it out to share cached prompts",
        )
    if parameters.grammar is not None and parameters.ignore_eos:
        raise invalid(
            parameters.name("grammar"),
            "cannot be combined with `ignore_eos_token`",
            "leave one out: the grammar says where the output ends",
        )
    if len(parameters.stop) > limits.max_stop_sequences:
        raise invalid(
            parameters.name("stop"),
            f"has {len(parameters.stop)} sequences, the limit is {limits.max_stop_sequences}",
            "send fewer, or start the server with a larger --max-stop-sequences",
        )
    if not all(parameters.stop):
        raise invalid(parameters.name("stop"), "has an empty sequence", "remove it")
    if parameters.truncate is not None and not 1 <= parameters.truncate <= limits.max_input_length:
        raise invalid(
            parameters.name("truncate"),
            f"must be between 1 and {limits.max_input_length}, not {parameters.truncate}",
        )
    most = limits.max_total_tokens - 1
    if parameters.max_new_tokens is not None and parameters.max_new_tokens > most:
        raise invalid(
            parameters.name("max_new_tokens"),
            f"must be at most {most}, not {parameters.max_new_tokens}",
            f"prompt and output together can have at most {limits.max_total_tokens} tokens",
        )


def _check_most(parameters: Parameters, what: str, most: int, flag: str) -> None:
    value = getattr(parameters, what)
    if value is not None and value > most:
        raise invalid(
            parameters.name(what),
            f"must be at most {most}, not {value}",
            f"send a smaller value, or start the server with a larger {flag}",
        )


def check_prompt(
    tokens: Sequence[int], parameters: Parameters, limits: Limits, vocab_size: int = 0
) -> None:
    """Raises InvalidRequest if a prompt and its output do not fit. `vocab_size`: the adapter's; 0: the base model's."""
    name, count, vocab_size = (
        parameters.name("inputs"),
        len(tokens),
        vocab_size or limits.vocab_size,
    )
    if not tokens:
        raise invalid(name, "is empty", "send at least one token")
    if count > limits.max_input_length:
        remedy = "" if "inputs" in parameters.names else ", or set `truncate` to keep its end"
        raise invalid(
            name,
            f"has {count} tokens, the limit is {limits.max_input_length}",
            f"shorten it{remedy}",
        )
    if not 0 <= min(tokens) <= max(tokens) < vocab_size:
        raise invalid(name, f"has a token outside of 0 to {vocab_size - 1}")
    room = limits.max_total_tokens - count
    wanted = parameters.max_new_tokens or 1
    if wanted > room:
        raise invalid(
            parameters.name("max_new_tokens"),
            f"and the prompt's {count} tokens are {count + wanted} together, "
            f"the limit is {limits.max_total_tokens}",
            f"set it to at most {room}, or shorten the prompt"
            if room > 0
            else "shorten the prompt",
        )


def invalid(name: str, problem: str, hint: str | None = None) -> InvalidRequest:
    """An error about the field `name`; `problem` continues a sentence that begins with it."""
    return InvalidRequest(f"`{name}` {problem}", field=name, hint=hint)


def refuse(**given: Any) -> None:
    """Raises InvalidRequest for the first of these unsupported parameters that was given."""
    for name, value in given.items():
        if value:
            raise invalid(name, "is not supported by this server", "leave it out")


def resolve_adapter(
    name: str | None, source: str | None, base_id: str, config: EngineConfig
) -> AdapterRef | None:
    """The adapter of a request; None for the base model. Without a name it is the server's --adapter-id, if set."""
    if not name:
        default = config.adapters.adapter_id
        return AdapterRef.parse(default) if default else None
    if name in (base_id, config.model.model_id, *BASE_NAMES):
        return None
    return AdapterRef.parse(name, source)
