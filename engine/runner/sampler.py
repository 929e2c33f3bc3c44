"""The next token of every row: penalties, temperature, filters, and a draw that only (seed, position) decide.

Every operation works row by row, so a row's token does not depend on the rest of the batch. The pipeline is that of
transformers' logits processors: repetition, frequency and presence penalties, temperature, top-k, top-p, typical-p,
min-p. The draw inverts the distribution's cumulative sum at one Philox number (Salmon et al. 2011, Philox4x32-10).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from engine.messages import SamplingParams, TokenOutput
from engine.runner.rows import RowTable
from engine.runner.transfer import ReadBack, upload

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF
NUCLEUS = 1024  # most likely tokens to look for a top-p set in before all of them are sorted


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four words of counter and two of key to four random words, all 32 bits held in int64."""
    for _ in range(PHILOX_ROUNDS):
        first = (
            counter[0] * PHILOX_MULTIPLIERS[0]
        )  # wraps as two's complement; the halves stay right
        second = counter[2] * PHILOX_MULTIPLIERS[1]
        counter = [
            ((second >> 32) & MASK) ^ counter[1] ^ key[0],
            second & MASK,
            ((first >> 32) & MASK) ^ counter[3] ^ key[1],
            first & MASK,
        ]
        key = [(key[0] + PHILOX_WEYL[0]) & MASK, (key[1] + PHILOX_WEYL[1]) & MASK]
    return counter


def philox_uniform(seeds: Tensor, positions: Tensor) -> Tensor:
    """Uniform numbers in (0, 1), float64, of int64 seeds (the key) and positions (the counter)."""
    zero = torch.zeros_like(seeds)
    words = philox(
        [positions & MASK, positions >> 32, zero, zero], [seeds & MASK, (seeds >> 32) & MASK]
    )
    bits = (words[0] << 20) | (words[1] >> 12)
    return (bits.double() + 0.5) / float(1 << 52)


def penalise(
    logits: Tensor,  # [n, vocab] float32, changed in place
    tokens: Tensor,  # [n, positions] int64: prompt and output of each row
    lengths: Tensor,  # [n] int64: known tokens
    prompt_lengths: Tensor,  # [n] int64
    repetition: Tensor,  # [n] float32; 1: off
    frequency: Tensor,  # [n] float32; 0: off
    presence: Tensor,  # [n] float32; 0: off
) -> None:
    """Keskar et al. 2019 over prompt and output; OpenAI's frequency and presence penalties over the output."""
    at = torch.arange(tokens.shape[1], device=tokens.device)[None]
    known = at < lengths[:, None]
    seen = torch.zeros_like(logits).scatter_add_(1, tokens, known.to(logits.dtype)) > 0
    factor = torch.where(logits > 0, 1 / repetition[:, None], repetition[:, None])
    logits.copy_(torch.where(seen, logits * factor, logits))
    output = (known & (at >= prompt_lengths[:, None])).to(logits.dtype)
    counts = torch.zeros_like(logits).scatter_add_(1, tokens, output)
    logits.sub_(frequency[:, None] * counts).sub_(presence[:, None] * (counts > 0))


def _keep_top_p(probs: Tensor, top_p: Tensor) -> Tensor:
    """The least probability inside the smallest set of mass top_p or more (Holtzman et al. 2020), [n, 1]."""
    count = min(NUCLEUS, probs.shape[1])
    values = probs.topk(count).values
    if count < probs.shape[1] and bool((values.sum(-1) < top_p).any()):
        values = probs.sort(descending=True).values
    before = values.cumsum(-1) - values
    inside = (before < top_p[:, None]).sum(-1, keepdim=True).clamp_(min=1)
    return values.gather(1, inside - 1)


def _typical(probs: Tensor, typical_p: Tensor) -> Tensor:
    """Mask of the tokens whose surprise is nearest the entropy, up to mass typical_p (Meister et al. 2023)."""
    surprise = -probs.log()
    entropy = torch.where(probs > 0, probs * surprise, 0.0).sum(-1, keepdim=True)
    distance, order = (surprise - entropy).abs().nan_to_num(posinf=float("inf")).sort()
    mass = probs.gather(1, order).cumsum(-1)
    inside = (mass < typical_p[:, None]).sum(-1, keepdim=True)
    limit = distance.gather(1, inside.clamp(max=probs.shape[1] - 1))
    return (surprise - entropy).abs() <= limit


@dataclass(frozen=True, slots=True)
class _Filters:
    """Sampling parameters of the sampled rows as tensors [n]; None where no row uses one."""

    temperature: Tensor
    seeds: Tensor
    top_k: Tensor | None
    top_p: Tensor | None
    typical_p: Tensor | None
    min_p: Tensor | None


def distribution(logits: Tensor, filters: _Filters) -> Tensor:
    """Probabilities [n, vocab] after temperature and filters; filtered tokens have none, rows sum to one."""
    probs = (logits / filters.temperature[:, None]).softmax(-1)
    if (top_k := filters.top_k) is not None:
        values = probs.topk(min(int(top_k.max()), probs.shape[1])).values
        last = (top_k - 1).clamp(0, values.shape[1] - 1)[:, None]
        probs = _restrict(probs, probs >= values.gather(1, last), top_k > 0)
    if (top_p := filters.top_p) is not None:
        probs = _restrict(probs, probs >= _keep_top_p(probs, top_p), top_p < 1)
    if (typical_p := filters.typical_p) is not None:
        probs = _restrict(probs, _typical(probs, typical_p), typical_p < 1)
    if (min_p := filters.min_p) is not None:
        least = probs.amax(-1, keepdim=True) * min_p[:, None]
        probs = _restrict(probs, probs >= least, min_p > 0)
    return probs


def _restrict(probs: Tensor, keep: Tensor, on: Tensor) -> Tensor:
    """Rows that are `on` keep the marked tokens and sum to one again; the others keep every bit."""
    kept = torch.where(keep, probs, 0.0)
    return torch.where(on[:, None], kept / kept.sum(-1, keepdim=True), probs)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Token of each row of [n, vocab] at `uniform` [n] float64 of its cumulative sum."""
    cumulative = probs.double().cumsum(-1)
    goal = uniform[:, None] * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, goal, right=True).squeeze(1).clamp_(max=probs.shape[1] - 1)
    )


class SamplePlan:
    """How a fixed list of rows is sampled: made when the list changes, used every step."""

    def __init__(self, params: list[SamplingParams], device: torch.device) -> None:
        self.params = params
        self.device = device
        drawn = [i for i, p in enumerate(params) if p.temperature > 0]
        self.drawn = self._indices(drawn)
        self.filters = self._filters([params[i] for i in drawn]) if drawn else None
        punished = [
            i
            for i, p in enumerate(params)
            if p.repetition_penalty != 1 or p.frequency_penalty or p.presence_penalty
        ]
        self.punished = self._indices(punished)
        self.penalties = [
            self._floats([getattr(params[i], name) for i in punished])
            for name in ("repetition_penalty", "frequency_penalty", "presence_penalty")
        ]
        self.reported_rows = [i for i, p in enumerate(params) if p.logprobs or p.num_alternatives]
        self.reported = self._indices(self.reported_rows)
        self.num_alternatives = max((p.num_alternatives for p in params), default=0)

    def _indices(self, values: list[int]) -> Tensor:
        return upload(values, torch.int64, self.device)

    def _floats(self, values: list[float]) -> Tensor:
        return upload(values, torch.float32, self.device)

    def _filters(self, drawn: list[SamplingParams]) -> _Filters:
        return _Filters(
            temperature=self._floats([p.temperature for p in drawn]),
            seeds=self._indices([p.seed for p in drawn]),
            top_k=self._indices([p.top_k for p in drawn]) if any(p.top_k for p in drawn) else None,
            top_p=self._floats([p.top_p for p in drawn])
            if any(p.top_p < 1 for p in drawn)
            else None,
            typical_p=self._floats([p.typical_p for p in drawn])
            if any(p.typical_p < 1 for p in drawn)
            else None,
            min_p=self._floats([p.min_p for p in drawn])
            if any(p.min_p > 0 for p in drawn)
            else None,
        )

    def sample(
        self,
        logits: Tensor,  # [n, vocab] float32
        table: RowTable,
        rows: Tensor,  # [n] int64
        lengths: Tensor,  # [n] int64: known tokens of each row = position of the new one
    ) -> Sampled:
        """The new tokens [n], with the log-probabilities that were asked for."""
        report = None
        if self.reported_rows:
            report = logits[self.reported].log_softmax(-1)
        if len(self.punished):
            i = self.punished
            changed, known = logits[i], lengths[i]
            tokens = table.tokens[rows[i], : int(known.max())].long()
            penalise(changed, tokens, known, table.prompt_lengths[rows[i]], *self.penalties)
            logits = logits.index_copy(0, i, changed)
        chosen = logits.argmax(-1)
        if self.filters is not None:
            probs = distribution(logits[self.drawn], self.filters)
            uniform = philox_uniform(self.filters.seeds, lengths[self.drawn])
            chosen = chosen.index_copy(0, self.drawn, draw(probs, uniform))
        if report is None:
            return Sampled(self, chosen)
        logprobs = report.gather(1, chosen[self.reported][:, None])[:, 0]
        if not self.num_alternatives:
            return Sampled(self, chosen, logprobs)
        top = report.topk(min(self.num_alternatives, report.shape[1]))
        return Sampled(self, chosen, logprobs, top.indices, top.values)


@dataclass(frozen=True, slots=True)
class Sampled:
    """What one step sampled: on the device, or fetched."""

    plan: SamplePlan
    tokens: Tensor  # [n] int64
    logprobs: Tensor | None = None  # [reported] float32
    top_ids: Tensor | None = None  # [reported, alternatives] int64
    top_logprobs: Tensor | None = None

    def fetched(self, way: ReadBack) -> Sampled:
        """The same on its way to the host."""

        def fetch(part: Tensor | None) -> Tensor | None:
            return part if part is None else way.fetch(part)

        return Sampled(
            self.plan,
            way.fetch(self.tokens),
            fetch(self.logprobs),
            fetch(self.top_ids),
            fetch(self.top_logprobs),
        )

    def outputs(self) -> list[TokenOutput]:
        """The tokens as messages; only once they have arrived."""
        plain = self.tokens.tolist()
        outputs = [TokenOutput(token) for token in plain]
        if self.logprobs is None:
            return outputs
        logprobs = self.logprobs.tolist()
        ids = [] if self.top_ids is None else self.top_ids.tolist()
        values = [] if self.top_logprobs is None else self.top_logprobs.tolist()
        for k, i in enumerate(self.plan.reported_rows):
            count = self.plan.params[i].num_alternatives
            pairs = list(zip(ids[k][:count], values[k][:count], strict=True)) if count else None
            outputs[i] = TokenOutput(plain[i], logprobs[k], pairs)
        return outputs
