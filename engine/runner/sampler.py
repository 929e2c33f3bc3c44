"""The next token of every row: penalties, temperature, filters, and a draw that depends on (seed, position) only.

Every operation works row by row, so a row's token does not depend on the rest of the batch. No operation waits for the
device. The order is that of transformers' logits processors: repetition, frequency and presence penalties, temperature,
top-k, top-p, typical-p, min-p. The draw inverts the cumulative sum of the distribution at one Philox number (Salmon et
al. 2011, Philox4x32-10). After the penalties come biases of single tokens, the watermark, and the grammar's mask.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import engine.ops  # noqa: F401 - declares torch.ops.lorax
from engine.messages import SamplingParams, TokenOutput
from engine.runner.rows import RowTable
from engine.runner.transfer import ReadBack, upload_all

PHILOX_ROUNDS = 10
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
MASK = 0xFFFFFFFF

# Fields of `SamplingParams` that are copied to the device as float32: of drawn rows, and of rows with penalties.
FRACTIONS = ("temperature", "top_p", "typical_p", "min_p")
PENALTIES = ("repetition_penalty", "frequency_penalty", "presence_penalty")
WATERMARK = ("watermark_gamma", "watermark_delta")
WATERMARK_KEY = 15485863  # as Kirchenbauer et al.
ALWAYS = 2**31 - 1

ops = torch.ops.lorax


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox4x32-10: from four counter words and two key words to four random words, each 32 bits in int64."""
    for _ in range(PHILOX_ROUNDS):
        # wraps around as two's complement, which keeps both halves correct
        first = counter[0] * PHILOX_MULTIPLIERS[0]
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


class Masks(NamedTuple):
    """The tokens that rows with a grammar may have next."""

    at: Tensor  # [n] int64: places of the rows among those that are sampled
    bits: Tensor  # [n, vocab / 32 rounded up] int32: bit t of a row allows token t


def allowed(logits: Tensor, bitmask: Tensor) -> Tensor:
    """[n, vocab], with -inf where the token's bit in `bitmask` [n, vocab / 32 rounded up] int32 is 0."""
    shifts = torch.arange(32, device=logits.device, dtype=torch.int32)
    bits = (bitmask[:, :, None] >> shifts) & 1
    keep = bits.flatten(1)[:, : logits.shape[1]].bool()
    keep = F.pad(
        keep, (0, logits.shape[1] - keep.shape[1])
    )  # tokens behind the grammar's vocabulary
    return logits.masked_fill(~keep, float("-inf"))


def penalise(
    logits: Tensor,  # [n, vocab] float32, changed in place
    tokens: Tensor,  # [n, positions] int64: prompt and output of each row
    lengths: Tensor,  # [n] int64: known tokens
    prompt_lengths: Tensor,  # [n] int64
    repetition: Tensor,  # [n] float32; 1: off
    frequency: Tensor,  # [n] float32; 0: off
    presence: Tensor,  # [n] float32; 0: off
) -> None:
    """Repetition (Keskar et al. 2019) counts prompt and output; OpenAI's frequency and presence the output only."""
    at = torch.arange(tokens.shape[1], device=tokens.device)[None]
    known = at < lengths[:, None]
    seen = torch.zeros_like(logits).scatter_add_(1, tokens, known.to(logits.dtype)) > 0
    factor = torch.where(logits > 0, 1 / repetition[:, None], repetition[:, None])
    logits.copy_(torch.where(seen, logits * factor, logits))
    output = (known & (at >= prompt_lengths[:, None])).to(logits.dtype)
    counts = torch.zeros_like(logits).scatter_add_(1, tokens, output)
    logits.sub_(frequency[:, None] * counts).sub_(presence[:, None] * (counts > 0))


def shift(
    logits: Tensor,  # [n, vocab] float32, changed in place
    generated: Tensor,  # [n] int64: tokens of the output of each row
    at: Tensor,  # [pairs] int64: rows
    tokens: Tensor,  # [pairs] int64
    values: Tensor,  # [pairs] float32
    until: Tensor,  # [pairs] int64: length of the output from which on the value does not count
) -> None:
    """Adds values to the logits of single tokens."""
    counts = torch.where(generated[at] < until, values, 0.0)
    logits.index_put_((at, tokens), counts, accumulate=True)


def watermark(
    logits: Tensor,  # [n, vocab] float32, changed in place
    previous: Tensor,  # [n] int64: the token before
    gamma: Tensor,  # [n] float32
    delta: Tensor,  # [n] float32
) -> None:
    """Favours the tokens of the green list (Kirchenbauer et al. 2023, algorithm 2).

    Token t is green after token s if Philox's number of key WATERMARK_KEY + s and counter t is below gamma.
    """
    positions = torch.arange(logits.shape[1], device=logits.device).expand_as(logits)
    keys = (previous + WATERMARK_KEY)[:, None].expand_as(logits)
    green = philox_uniform(keys, positions) < gamma[:, None]
    logits.add_(torch.where(green, delta[:, None], 0.0))


def _typical(probs: Tensor, typical_p: Tensor) -> Tensor:
    """Mask of the tokens whose surprise is nearest to the entropy, up to mass typical_p (Meister et al. 2023)."""
    surprise = -probs.log()
    entropy = torch.where(probs > 0, probs * surprise, 0.0).sum(-1, keepdim=True)
    distance, order = (surprise - entropy).abs().nan_to_num(posinf=float("inf")).sort()
    mass = probs.gather(1, order).cumsum(-1)
    inside = (mass < typical_p[:, None]).sum(-1, keepdim=True)
    limit = distance.gather(1, inside.clamp(max=probs.shape[1] - 1))
    return (surprise - entropy).abs() <= limit


@dataclass(frozen=True, slots=True)
class _Filters:
    """Sampling parameters of the drawn rows as tensors [n]; None if no row uses the filter."""

    temperature: Tensor
    seeds: Tensor
    top_k: Tensor | None
    largest_top_k: int
    top_p: Tensor | None
    typical_p: Tensor | None
    min_p: Tensor | None


def distribution(logits: Tensor, filters: _Filters) -> Tensor:
    """Probabilities [n, vocab] after temperature and filters: 0 for filtered tokens; each row sums to one."""
    probs = (logits / filters.temperature[:, None]).softmax(-1)
    if (top_k := filters.top_k) is not None:
        values = probs.topk(min(filters.largest_top_k, probs.shape[1])).values
        last = (top_k - 1).clamp(0, values.shape[1] - 1)[:, None]
        probs = _restrict(probs, probs >= values.gather(1, last), top_k > 0)
    if (top_p := filters.top_p) is not None:
        probs = _restrict(probs, probs >= ops.top_p_floor(probs, top_p), top_p < 1)
    if (typical_p := filters.typical_p) is not None:
        probs = _restrict(probs, _typical(probs, typical_p), typical_p < 1)
    if (min_p := filters.min_p) is not None:
        least = probs.amax(-1, keepdim=True) * min_p[:, None]
        probs = _restrict(probs, probs >= least, min_p > 0)
    return probs


def _restrict(probs: Tensor, keep: Tensor, on: Tensor) -> Tensor:
    """Rows that are `on` keep the tokens in `keep` and sum to one again. The other rows stay bit for bit."""
    kept = torch.where(keep, probs, 0.0)
    return torch.where(on[:, None], kept / kept.sum(-1, keepdim=True), probs)


def draw(probs: Tensor, uniform: Tensor) -> Tensor:
    """Token of each row of [n, vocab] at `uniform` [n] float64 of its cumulative sum."""
    cumulative = probs.double().cumsum(-1)
    goal = uniform[:, None] * cumulative[:, -1:]
    return (
        torch.searchsorted(cumulative, goal, right=True).squeeze(1).clamp_(max=probs.shape[1] - 1)
    )


def _filters(
    params: list[SamplingParams], seeds: Tensor, top_k: Tensor, fractions: list[Tensor]
) -> _Filters:
    """The filters that at least one drawn row uses."""
    temperature, top_p, typical_p, min_p = fractions
    return _Filters(
        temperature=temperature,
        seeds=seeds,
        top_k=top_k if any(p.top_k for p in params) else None,
        largest_top_k=max(p.top_k for p in params),
        top_p=top_p if any(p.top_p < 1 for p in params) else None,
        typical_p=typical_p if any(p.typical_p < 1 for p in params) else None,
        min_p=min_p if any(p.min_p > 0 for p in params) else None,
    )


def _punished(params: SamplingParams) -> bool:
    return bool(
        params.repetition_penalty != 1 or params.frequency_penalty or params.presence_penalty
    )


class SamplePlan:
    """How a fixed list of rows is sampled. Made when the list changes, used in every step."""

    def __init__(self, params: list[SamplingParams], device: torch.device) -> None:
        self.params = params
        drawn = [i for i, p in enumerate(params) if p.temperature > 0]
        punished = [i for i, p in enumerate(params) if _punished(p)]
        self.reported_rows = [i for i, p in enumerate(params) if p.logprobs or p.num_alternatives]
        self.num_alternatives = max((p.num_alternatives for p in params), default=0)
        of_drawn = [params[i] for i in drawn]
        marked = [i for i, p in enumerate(params) if p.watermark_gamma]
        shifts = [one for i, p in enumerate(params) for one in _shifts(i, p)]
        self.shifted = bool(shifts)
        integers = [drawn, punished, self.reported_rows, marked]
        integers += [[p.seed for p in of_drawn], [p.top_k for p in of_drawn]]
        integers += [[one.row for one in shifts], [one.token for one in shifts]]
        integers.append([one.until for one in shifts])
        floats = [[getattr(p, name) for p in of_drawn] for name in FRACTIONS]
        floats += [[getattr(params[i], name) for i in punished] for name in PENALTIES]
        floats += [[getattr(params[i], name) for i in marked] for name in WATERMARK]
        floats.append([one.value for one in shifts])
        on_device = iter(upload_all(integers, floats, device))
        self.drawn, self.punished, self.reported, self.marked = islice(on_device, 4)
        seeds, top_k, at, tokens, until = islice(on_device, 5)
        fractions = list(islice(on_device, len(FRACTIONS)))
        self.penalties = list(islice(on_device, len(PENALTIES)))
        self.watermark = list(islice(on_device, len(WATERMARK)))
        self.shifts = (at, tokens, next(on_device), until)
        self.filters = _filters(of_drawn, seeds, top_k, fractions) if drawn else None

    def sample(
        self,
        logits: Tensor,  # [n, vocab]
        table: RowTable,
        rows: Tensor,  # [n] int32 or int64
        lengths: Tensor,  # [n] int32 or int64: known tokens of each row, the position of the new token
        longest: int | None = None,
        masks: Masks | None = None,
    ) -> Sampled:
        """The new tokens [n], also written to their rows, with the log-probabilities that requests want.

        A row whose logits are not finite has no token: -1, and 0 in its row.
        `longest`: no row has more known tokens. The log-probabilities are those before penalties and filters.
        """
        report = None
        if self.reported_rows:
            report = logits[self.reported].float().log_softmax(-1)
        if len(self.punished):
            logits = self._penalised(logits.float(), table, rows, lengths, longest)
        if self.shifted:
            logits = logits.to(torch.float32, copy=True)
            shift(logits, lengths.long() - table.prompt_lengths[rows.long()].long(), *self.shifts)
        if len(self.marked):
            logits = self._watermarked(logits.float(), table, rows, lengths)
        if masks is not None:
            masked = allowed(logits[masks.at], masks.bits)
            logits = logits.index_copy(0, masks.at, masked)
        chosen = ops.pick_greedy_(logits, rows, lengths, table.tokens)
        if self.filters is not None:
            probs = distribution(logits[self.drawn].float(), self.filters)
            positions = lengths[self.drawn].long()
            drawn = draw(probs, philox_uniform(self.filters.seeds, positions))
            broken = chosen[self.drawn] < 0
            table.store(rows[self.drawn].long(), positions, drawn.masked_fill(broken, 0))
            chosen = chosen.index_copy(0, self.drawn, drawn.masked_fill_(broken, -1))
        if report is None:
            return Sampled(self, chosen)
        logprobs = report.gather(1, chosen[self.reported].clamp(min=0)[:, None])[:, 0]
        if not self.num_alternatives:
            return Sampled(self, chosen, logprobs)
        top = report.topk(min(self.num_alternatives, report.shape[1]))
        return Sampled(self, chosen, logprobs, top.indices, top.values)

    def _penalised(
        self,
        logits: Tensor,
        table: RowTable,
        rows: Tensor,
        lengths: Tensor,
        longest: int | None,
    ) -> Tensor:
        """The float32 logits, with penalties in the rows that have penalties."""
        changed, index = logits[self.punished], rows[self.punished].long()
        tokens = table.tokens[index, :longest].long()
        known_lengths = lengths[self.punished].long()
        prompt_lengths = table.prompt_lengths[index].long()
        penalise(changed, tokens, known_lengths, prompt_lengths, *self.penalties)
        return logits.index_copy(0, self.punished, changed)

    def _watermarked(
        self, logits: Tensor, table: RowTable, rows: Tensor, lengths: Tensor
    ) -> Tensor:
        """The float32 logits, with the watermark in the rows that have one."""
        changed, index = logits[self.marked], rows[self.marked].long()
        previous = table.tokens[index, lengths[self.marked].long() - 1].long()
        watermark(changed, previous, *self.watermark)
        return logits.index_copy(0, self.marked, changed)


class _Shift(NamedTuple):
    """A value that is added to the logit of one token of a row."""

    row: int
    token: int
    value: float
    until: int  # length of the output from which on it does not count


def _shifts(row: int, params: SamplingParams) -> Iterator[_Shift]:
    for token, value in params.logit_bias.items():
        yield _Shift(row, token, value, ALWAYS)
    if params.min_tokens:
        for token in params.delayed:
            yield _Shift(row, token, float("-inf"), params.min_tokens)


@dataclass(frozen=True, slots=True)
class Sampled:
    """The sampled tokens of one step, on the device or fetched to the host."""

    plan: SamplePlan
    tokens: Tensor  # [n] int64
    logprobs: Tensor | None = None  # [reported] float32
    top_ids: Tensor | None = None  # [reported, alternatives] int64
    top_logprobs: Tensor | None = None

    def fetched(self, readback: ReadBack) -> Sampled:
        """The same, being copied to the host."""

        def fetch(part: Tensor | None) -> Tensor | None:
            return part if part is None else readback.fetch(part)

        return Sampled(
            self.plan,
            readback.fetch(self.tokens),
            fetch(self.logprobs),
            fetch(self.top_ids),
            fetch(self.top_logprobs),
        )

    def outputs(self) -> list[TokenOutput]:
        """The tokens as messages. Call it only after they have arrived."""
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
