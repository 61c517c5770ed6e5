"""From logits to tokens: a pure function of the logits, the parameters and the row's key.

The vocabulary stays cut over the tensor-parallel ranks. Ranks exchange their best candidates, never their logits:
the Gumbel-max trick (Gumbel, 1954; Maddison et al., NeurIPS 2014) turns a draw into an argmax, and an argmax needs
one number a rank. Every rank ends with the same tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.parallel.mesh import Axis
from shoal.worker.random import gumbel

_FIRST_CANDIDATES = 256  # a nucleus is seldom larger; where it is, more are fetched
_NEVER = float("-inf")


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Parameters of the m rows that are sampled."""

    temperature: Tensor  # float32 [m]; 0 is greedy
    top_k: Tensor  # int64 [m]; 0 is all
    top_p: Tensor  # float32 [m]
    keys: Tensor  # int32 [m, 2]
    greedy: bool  # every row is
    truncated: Sequence[int]  # rows that draw from some of the tokens only
    logprobs: int  # likeliest tokens wanted by any row, -1: none by none


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities before temperature and truncation."""

    chosen: Tensor  # float32 [m]
    ids: Tensor  # int64 [m, logprobs], likeliest first
    values: Tensor  # float32 [m, logprobs]


@dataclass(frozen=True, slots=True)
class VocabShare:
    """The ids that this rank has logits for, and how many each rank has."""

    start: int
    sizes: tuple[int, ...]


def sample(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows) -> Tensor:
    """logits: float32 [m, share.sizes[tp.rank]]. Gives token ids, int64 [m]."""
    if rows.greedy:
        return _best(logits, share, tp)
    sampled = rows.temperature > 0
    scaled = logits / torch.where(sampled, rows.temperature, 1.0).unsqueeze(1)
    ids = torch.arange(share.start, share.start + logits.shape[1], dtype=torch.int32, device=logits.device)
    noise = gumbel(rows.keys, ids) * sampled.unsqueeze(1)
    tokens = _best(scaled + noise, share, tp)
    if rows.truncated:
        chosen = torch.tensor(rows.truncated, device=logits.device)
        tokens[chosen] = _sample_truncated(
            scaled[chosen], share, tp, rows.top_k[chosen], rows.top_p[chosen], rows.keys[chosen]
        )
    return tokens


def logprobs(logits: Tensor, share: VocabShare, tp: Axis, tokens: Tensor, count: int) -> Logprobs:
    """Of the chosen tokens and of the `count` likeliest ones."""
    total = _logsumexp(logits, tp)
    local = tokens - share.start
    mine = (local >= 0) & (local < logits.shape[1])
    if logits.shape[1]:
        value = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    else:
        value = logits.new_zeros(len(logits))
    chosen = tp.comm.all_gather(value.masked_fill(~mine, _NEVER).unsqueeze(1), [1] * tp.size, 1).amax(1)
    top = _top(logits, share, tp, count)
    return Logprobs(chosen - total, top.ids[:, :count], top.values[:, :count] - total.unsqueeze(1))


def _best(scores: Tensor, share: VocabShare, tp: Axis) -> Tensor:
    """The id of the largest score over all ranks; the lowest id where several are largest."""
    if tp.size == 1:
        return scores.argmax(1)
    if scores.shape[1]:
        value, index = scores.max(1)
        pair = torch.stack([value.double(), (index + share.start).double()], 1)
    else:
        pair = torch.tensor([[_NEVER, 0.0]], dtype=torch.float64, device=scores.device).repeat(len(scores), 1)
    pairs = tp.comm.all_gather(pair, [2] * tp.size, 1).view(len(scores), tp.size, 2)
    winner = pairs[:, :, 0].argmax(1, keepdim=True)
    return pairs[:, :, 1].gather(1, winner).squeeze(1).long()


def _logsumexp(logits: Tensor, tp: Axis) -> Tensor:
    local = logits.logsumexp(1) if logits.shape[1] else logits.new_full((len(logits),), _NEVER)
    return tp.comm.all_gather(local.unsqueeze(1), [1] * tp.size, 1).logsumexp(1)


@dataclass(frozen=True, slots=True)
class _Top:
    """Candidates in falling order, and down to which value no rank holds one that is not here."""

    values: Tensor  # float32 [m, c]
    ids: Tensor  # int64 [m, c], rising where values are equal
    complete_to: Tensor  # float32 [m]; candidates above it are all here, of those equal to it some may not be


def _top(scores: Tensor, share: VocabShare, tp: Axis, count: int) -> _Top:
    counts = [min(size, count) for size in share.sizes]
    values, ids = scores.topk(counts[tp.rank], dim=1)
    # What a rank keeps back is at most its last candidate.
    kept_back = values[:, -1:] if 0 < counts[tp.rank] < scores.shape[1] else scores.new_full((len(scores), 1), _NEVER)
    values = tp.comm.all_gather(values, counts, 1)
    ids = tp.comm.all_gather(ids + share.start, counts, 1)
    complete_to = tp.comm.all_gather(kept_back, [1] * tp.size, 1).amax(1)
    bits = (values + 0.0).view(torch.int32)  # turns -0.0 into 0.0, which is equal
    rank = bits ^ ((bits >> 31) & 0x7FFFFFFF)  # integers in the order of the floats
    order = ((rank.long() << 32) - ids).argsort(dim=1, descending=True)
    return _Top(values.gather(1, order), ids.gather(1, order), complete_to)


def _sample_truncated(
    scaled: Tensor, share: VocabShare, tp: Axis, top_k: Tensor, top_p: Tensor, keys: Tensor
) -> Tensor:
    """Top-k, then top-p over what is left (the nucleus of Holtzman et al., ICLR 2020), then the draw."""
    total = _logsumexp(scaled, tp)
    limited = top_k > 0
    count = max(_FIRST_CANDIDATES, int(top_k.max()) + 1)  # one more shows whether the last one has equals
    while True:
        top = _top(scaled, share, tp, count)
        within_k = torch.arange(top.values.shape[1], device=scaled.device) < top_k.unsqueeze(1)
        allowed = within_k | ~limited.unsqueeze(1)
        values = top.values.masked_fill(~allowed, _NEVER)
        norm = torch.where(limited, values.logsumexp(1), total)
        probabilities = (values - norm.unsqueeze(1)).exp()
        before = probabilities.cumsum(1) - probabilities
        certain = top.values > top.complete_to.unsqueeze(1)
        reached = torch.where(certain, before + probabilities, 0).amax(1) >= top_p
        if count >= max(share.sizes) or bool((reached | limited & (certain.sum(1) >= top_k)).all()):
            break
        count *= 8
    allowed &= before < top_p.unsqueeze(1)
    noise = gumbel(keys, top.ids.int())
    scores = (values + noise).masked_fill(~allowed, _NEVER)
    return top.ids.gather(1, scores.argmax(1, keepdim=True)).squeeze(1)
