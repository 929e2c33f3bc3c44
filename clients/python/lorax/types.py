"""What is sent to a server and what it answers, as pydantic models.

A parameter out of range raises `lorax.errors.ValidationError`, one of the wrong type pydantic's. Fields of answers that
a model does not have are ignored, unless it says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from lorax.errors import ValidationError

MERGE_STRATEGIES = (
    "linear",
    "ties",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "cat",
    "svd",
)
MAJORITY_SIGN_METHODS = ("total", "frequency")

Rules = Iterable[tuple[str, Callable[[Any], bool], str]]


def _check(model: BaseModel, rules: Rules) -> None:
    """Raises ValidationError for the first of the given fields that is not allowed."""
    for name, allowed, rule in rules:
        value = getattr(model, name)
        if value is not None and not allowed(value):
            raise ValidationError(f"`{name}` {rule}")


# -- requests


class MergedAdapters(BaseModel):
    """Several adapters, merged for one request."""

    ids: list[str]
    weights: list[float]  # one per adapter
    merge_strategy: str | None = None  # None: linear
    density: float | None = None  # fraction of values to keep; TIES, DARE and pruning need it
    majority_sign_method: str | None = None
    seed: int | None = None  # chooses the values that DARE drops

    @model_validator(mode="after")
    def _valid(self) -> Self:
        _check(self, _MERGE_RULES)
        if len(self.ids) != len(self.weights):
            raise ValidationError("`ids` and `weights` must have the same length")
        return self


_MERGE_RULES: Rules = (
    ("ids", bool, "cannot be empty"),
    ("weights", bool, "cannot be empty"),
    ("merge_strategy", MERGE_STRATEGIES.__contains__, f"must be one of {MERGE_STRATEGIES}"),
    ("density", lambda v: 0 <= v <= 1, "must be between 0 and 1"),
    (
        "majority_sign_method",
        MAJORITY_SIGN_METHODS.__contains__,
        f"must be one of {MAJORITY_SIGN_METHODS}",
    ),
    ("seed", lambda v: v >= 0, "must be 0 or more"),
)


class ResponseFormatType(StrEnum):
    text = "text"
    json_object = "json_object"
    json_schema = "json_schema"


class ResponseFormat(BaseModel):
    """A format that the text must have. Fields beyond these are sent as they are."""

    model_config = ConfigDict(extra="allow", use_enum_values=True)

    type: ResponseFormatType | str
    schema_spec: dict[str, Any] | None = Field(default=None, alias="schema")


class Parameters(BaseModel):
    """How to generate. None: the server's default."""

    adapter_id: str | None = (
        None  # id or id@revision; None: the server's --adapter-id or the base model
    )
    adapter_source: str | None = None
    merged_adapters: MergedAdapters | None = None  # instead of adapter_id
    api_token: str | None = Field(default=None, repr=False)  # for private adapters
    do_sample: bool = False  # else greedy, unless another parameter turns sampling on
    max_new_tokens: int | None = None  # None: as many as fit
    min_new_tokens: int | None = None  # the answer does not end before
    ignore_eos_token: bool = False  # continue after an end-of-sequence token
    repetition_penalty: float | None = None  # 1 disables it; counts prompt and answer
    frequency_penalty: float | None = None  # 0 disables it; counts the answer
    presence_penalty: float | None = None  # 0 disables it; counts the answer
    return_full_text: bool = False  # the text begins with the prompt
    stop: list[str] = []  # texts that end the answer
    seed: int | None = None
    temperature: float | None = None  # 0 is greedy
    top_k: int | None = None  # sample from this many most likely tokens
    top_p: float | None = (
        None  # sample from the most likely tokens that have this probability together
    )
    min_p: float | None = None  # minimum probability, as a fraction of the most likely token's
    typical_p: float | None = None  # sample from the most typical tokens (arXiv 2202.00666)
    truncate: int | None = None  # keep this many of the prompt's last tokens
    best_of: int | None = None  # generate this many answers; the most likely one is returned
    watermark: bool = False
    details: bool = False  # tokens, log-probabilities and the reason of the end
    decoder_input_details: bool = False  # log-probabilities of the prompt
    return_k_alternatives: int | None = None  # most likely tokens at each position
    response_format: ResponseFormat | None = None
    cache_salt: str | None = Field(default=None, repr=False)  # who shares cached prompts
    priority: int | None = None  # higher: before others, as far as the server allows

    @property
    def samples(self) -> bool:
        """Whether the server samples, rather than take the most likely token."""
        filters = (
            self.top_k not in (None, 0, -1),
            self.top_p not in (None, 1),
            self.typical_p not in (None, 1),
            self.min_p not in (None, 0),
        )
        return self.do_sample or self.temperature not in (None, 0, 1) or any(filters)

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if self.adapter_id is not None and self.merged_adapters is not None:
            raise ValidationError("`adapter_id` and `merged_adapters` exclude each other")
        _check(self, _PARAMETER_RULES)
        if self.best_of is not None and self.best_of > 1:
            if self.seed is not None:
                raise ValidationError("`best_of` above 1 and `seed` exclude each other")
            if not self.samples:
                raise ValidationError("`best_of` above 1 needs sampling: set `do_sample`")
        return self


_PARAMETER_RULES: Rules = (
    ("max_new_tokens", lambda v: v > 0, "must be 1 or more"),
    ("min_new_tokens", lambda v: v >= 0, "must be 0 or more"),
    ("repetition_penalty", lambda v: v > 0, "must be above 0"),
    ("frequency_penalty", lambda v: -2 <= v <= 2, "must be between -2 and 2"),
    ("presence_penalty", lambda v: -2 <= v <= 2, "must be between -2 and 2"),
    ("stop", all, "has an empty sequence"),
    ("seed", lambda v: v >= 0, "must be 0 or more"),
    ("temperature", lambda v: v >= 0, "must be 0 or more"),
    ("top_k", lambda v: v >= -1, "must be 0 or more"),
    ("top_p", lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    ("min_p", lambda v: 0 <= v <= 1, "must be between 0 and 1"),
    ("typical_p", lambda v: 0 < v <= 1, "must be above 0 and at most 1"),
    ("truncate", lambda v: v > 0, "must be 1 or more"),
    ("best_of", lambda v: v > 0, "must be 1 or more"),
    ("return_k_alternatives", lambda v: v > 0, "must be 1 or more"),
)


class _Inputs(BaseModel):
    parameters: Parameters | None = None
    stream: bool = False

    @model_validator(mode="after")
    def _valid(self) -> Self:
        if not getattr(self, "inputs", None):
            raise ValidationError("`inputs` cannot be empty")
        if self.stream and self.parameters is not None and (self.parameters.best_of or 1) > 1:
            raise ValidationError("`best_of` above 1 cannot be streamed")
        return self


class Request(_Inputs):
    inputs: str


class BatchRequest(_Inputs):
    inputs: list[str]


# -- answers


class InputToken(BaseModel):
    """A token of the prompt."""

    id: int
    text: str
    logprob: float | None = None  # None: the first token


class AlternativeToken(BaseModel):
    id: int
    text: str
    logprob: float | None = None


class Token(BaseModel):
    """A token of the answer. The texts of those that are not special make the answer."""

    id: int
    text: str
    logprob: float | None = None
    special: bool
    skipped: bool = False
    alternative_tokens: list[AlternativeToken] | None = None


class FinishReason(StrEnum):
    Length = "length"
    EndOfSequenceToken = "eos_token"
    StopSequence = "stop_sequence"


class BestOfSequence(BaseModel):
    """An answer that is not the best."""

    generated_text: str
    finish_reason: FinishReason
    generated_tokens: int
    seed: int | None = None
    prefill: list[InputToken]
    tokens: list[Token]


class Details(BaseModel):
    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    skipped_tokens: int = 0
    seed: int | None = None  # None: greedy
    prefill: list[InputToken]  # empty without decoder_input_details
    tokens: list[Token]
    best_of_sequences: list[BestOfSequence] | None = None


class Response(BaseModel):
    generated_text: str
    details: Details | None = None


class StreamDetails(BaseModel):
    finish_reason: FinishReason
    prompt_tokens: int
    generated_tokens: int
    seed: int | None = None


class StreamResponse(BaseModel):
    """One token. The last one has the whole text, and the details if they were asked for."""

    token: Token
    generated_text: str | None = None
    details: StreamDetails | None = None


class DeployedModel(BaseModel):
    model_config = ConfigDict(protected_namespaces=())

    model_id: str
    sha: str


class EmbedResponse(BaseModel):
    embeddings: list[float] | None


class ClassifyResponse(BaseModel):
    entities: list[dict[str, Any]] | None


class TextToken(BaseModel):
    """A token of a text, and its characters from `start` to before `stop`."""

    id: int
    text: str
    start: int
    stop: int


class Info(BaseModel):
    """A server. It has the fields beyond these as attributes, too."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model_id: str
    model_sha: str | None = None
    model_dtype: str
    model_device_type: str
    model_pipeline_tag: str | None = None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_length: int
    max_total_tokens: int
    version: str


class AdapterInfo(BaseModel):
    """An adapter that the server knows. It has the fields beyond these as attributes, too."""

    model_config = ConfigDict(extra="allow")

    id: str
    source: str | None = None
    revision: str | None = None
    digest: str | None = None
    state: str | None = None  # listed, fetching, parsing, ready or failed
    tier: str | None = None  # device, host, disk or source: the fastest place that has it
    pinned: bool = False
    bytes: int | None = None
    rank: int | None = None  # the largest
    targets: list[str] = []
    base_model: str | None = None
    requests: int = 0  # that use it now
    hits: int = 0
    last_used: str | None = None  # ISO 8601, UTC
    error: dict[str, Any] | None = None  # of the last load


class Alias(BaseModel):
    """A name that stands for an adapter."""

    name: str
    adapter_id: str
    adapter_source: str | None = None
    digest: str | None = None  # None: set at the server's start, not loaded yet
    previous: Alias | None = None  # what the name stood for before it was set
