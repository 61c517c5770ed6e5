"""From logits to tokens: a pure function of the logits, the parameters and the row's key.

The vocabulary stays cut over the tensor-parallel ranks. Ranks exchange their best candidates, never their logits:
the Gumbel-max trick (Gumbel, 1954; Maddison et al., NeurIPS 2014) turns a draw into an argmax, and an argmax needs
one number a rank. Every rank ends with the same tokens.

Rows are independent: several may belong to one sequence, each with its own key.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.noise import gumbel
from shoal.kernels.sampling import BEHIND_ALL, of_ranks, ranks_of, sampling_kernels
from shoal.parallel.mesh import Axis
from shoal.worker.edits import NEVER, Edits, apply_edits

_FIRST_CANDIDATES = 256  # a nucleus is seldom larger


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Parameters of the m rows that are sampled."""

    temperature: Tensor  # float32 [m]; 0 is greedy
    top_k: Tensor  # int64 [m]; 0 is all
    top_p: Tensor  # float32 [m]
    min_p: Tensor  # float32 [m]; 0 is all
    keys: Tensor  # int32 [m, 2]
    greedy: bool  # every row is
    truncated: Sequence[int]  # rows that draw, and from some of the tokens only: top_k, top_p or min_p
    logprobs: int  # likeliest tokens wanted by any row, -1: none by none
    edits: Edits | None = None


@dataclass(frozen=True, slots=True)
class Logprobs:
    """Log-probabilities, and ranks among the whole vocabulary, by the logits given."""

    chosen: Tensor  # float32 [m]
    ranks: Tensor  # int64 [m]; 1 + the number of tokens with a larger logit
    ids: Tensor  # int64 [m, count], likeliest first, of equals the lowest id first
    values: Tensor  # float32 [m, count]


@dataclass(frozen=True, slots=True)
class VocabShare:
    """The ids that this rank has logits for, and how many each rank has."""

    start: int
    sizes: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Draw:
    tokens: Tensor  # int64 [m]
    scores: Tensor  # float32 [m]; -inf where no token could be drawn


def sample(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows) -> Tensor:
    """logits: float32 [m, share.sizes[tp.rank]]. Gives token ids, int64 [m].

    Applies `rows.edits` itself, to a copy where `rows.logprobs` says that the logits are asked for afterwards, else in
    place. A row that is -inf all over draws the lowest id that its edits do not forbid, or, where they forbid every
    one, the likeliest token before the edits.
    """
    if rows.edits is None:
        return _draw(logits, share, tp, rows).tokens
    doubtful = _doubtful(rows.edits, rows.keys, sum(share.sizes))
    likeliest = _best(logits[doubtful], share, tp).tokens if len(doubtful) else doubtful
    if rows.logprobs >= 0:
        logits = logits.clone()
    apply_edits(logits, share.start, rows.edits)
    draw = _draw(logits, share, tp, rows)
    empty = draw.scores == NEVER
    if bool(empty.any()):
        before = torch.zeros_like(draw.tokens).index_copy(0, doubtful, likeliest)
        return torch.where(empty, _lowest_permitted(rows.edits, before, sum(share.sizes)), draw.tokens)
    return draw.tokens


def logprobs(logits: Tensor, share: VocabShare, tp: Axis, tokens: Tensor, count: int) -> Logprobs:
    """Of one token a row and of the `count` likeliest ones, at most the whole vocabulary.

    logits: float32 [m, share.sizes[tp.rank]]; tokens: int64 [m], ids within the vocabulary.
    """
    everything = torch.arange(len(logits), device=logits.device)
    ones = logits.new_ones(len(logits))
    total = _log_totals(logits, everything, share, tp, ones, logits.new_full((len(logits),), NEVER))
    local = tokens - share.start
    mine = (local >= 0) & (local < logits.shape[1])
    if logits.shape[1]:
        value = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    else:
        value = logits.new_zeros(len(logits))
    chosen = tp.comm.all_gather(value.masked_fill(~mine, NEVER).unsqueeze(1), [1] * tp.size, 1).amax(1)
    above = tp.comm.all_reduce(sampling_kernels(logits).count_above(logits, chosen))
    top = _first(logits, everything, share, tp, count)
    return Logprobs(chosen - total, above + 1, top.ids, top.values - total.unsqueeze(1))


def _draw(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows) -> _Draw:
    """Greedy rows, rows that draw from everything, and truncated ones."""
    if rows.greedy:
        return _best(logits, share, tp)
    sampled = rows.temperature > 0
    truncated = torch.tensor(rows.truncated, dtype=torch.int64, device=logits.device)
    sampled[truncated] = False
    free = sampled.nonzero().squeeze(1)
    tokens = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    scores = logits.new_zeros(len(logits))
    groups = [(truncated, _draw_truncated), (free, _draw_free)]
    if len(truncated) + len(free) < len(logits):
        greedy = (rows.temperature == 0).nonzero().squeeze(1)
        groups.append((greedy, _draw_greedy))
    for chosen, draw in groups:
        if len(chosen):
            found = draw(logits, share, tp, rows, chosen)
            tokens[chosen], scores[chosen] = found.tokens, found.scores
    return _Draw(tokens, scores)


def _draw_greedy(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, chosen: Tensor) -> _Draw:
    return _best(logits[chosen], share, tp)


def _draw_free(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, chosen: Tensor) -> _Draw:
    """From the whole vocabulary."""
    return _draw_ahead(logits, share, tp, rows, chosen, None)


def _draw_ahead(
    logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, of: Tensor, limits: Tensor | None
) -> _Draw:
    """From the tokens ahead of the limits, which are ranks as `ranks_of` gives them."""
    if logits.shape[1] == 0:
        return _best_of_ranks(*_nothing(logits, len(of)), tp)
    kernels = sampling_kernels(logits)
    return _best_of_ranks(*kernels.draw(logits, share.start, of, rows.temperature[of], rows.keys[of], limits), tp)


def _best(logits: Tensor, share: VocabShare, tp: Axis) -> _Draw:
    """The largest logit over all ranks; the lowest id where several are largest."""
    if logits.shape[1] == 0:
        return _best_of_ranks(*_nothing(logits, len(logits)), tp)
    return _best_of_ranks(*sampling_kernels(logits).best(logits, share.start), tp)


def _nothing(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """What a rank without a share of the vocabulary brings."""
    return logits.new_full((count,), NEVER), torch.zeros(count, dtype=torch.int64, device=logits.device)


def _best_of_ranks(scores: Tensor, ids: Tensor, tp: Axis) -> _Draw:
    """float32 [m] and int64 [m] of each rank; of equals the first rank's, whose ids are the lowest."""
    if tp.size == 1:
        return _Draw(ids, scores)
    pair = torch.stack([scores.double(), ids.double()], 1)
    pairs = tp.comm.all_gather(pair, [2] * tp.size, 1).view(len(scores), tp.size, 2)
    score, winner = pairs[:, :, 0].max(1, keepdim=True)
    return _Draw(pairs[:, :, 1].gather(1, winner).squeeze(1).long(), score.squeeze(1).float())


def _log_totals(
    logits: Tensor,
    rows: Tensor,
    share: VocabShare,
    tp: Axis,
    temperature: Tensor,
    floor: Tensor,
    limits: Tensor | None = None,
) -> Tensor:
    """`SamplingKernels.log_totals` over all ranks."""
    local = sampling_kernels(logits).log_totals(logits, share.start, rows, temperature, floor, limits)
    return tp.comm.all_gather(local.unsqueeze(1), [1] * tp.size, 1).logsumexp(1) if tp.size > 1 else local


@dataclass(frozen=True, slots=True)
class _First:
    """Tokens by falling logit, equals by rising id."""

    values: Tensor  # float32 [m, c]
    ids: Tensor  # int64 [m, c]


def _first(logits: Tensor, rows: Tensor, share: VocabShare, tp: Axis, count: int) -> _First:
    """The first `count` tokens of all ranks, or all there are."""
    ranks = sampling_kernels(logits).first(logits, share.start, rows, count)
    if tp.size > 1:
        ranks = tp.comm.all_gather(ranks, [min(size, count) for size in share.sizes], 1)
        ranks = ranks.sort(dim=1, descending=True).values[:, :count]
    return _First(*of_ranks(ranks))


def _draw_truncated(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, chosen: Tensor) -> _Draw:
    """Min-p, top-k, then top-p over what is left (the nucleus of Holtzman et al., ICLR 2020), then the draw.

    What is left are the first tokens by logit. Nearly always a few candidates hold them all.
    """
    vocabulary = sum(share.sizes)
    draw, enough, totals = _draw_from_first(logits, share, tp, rows, chosen, min(vocabulary, _FIRST_CANDIDATES))
    if bool(enough.all()):
        return draw
    limited = rows.top_k[chosen] > 0
    many = (~enough & limited).nonzero().squeeze(1)
    if len(many):
        of = chosen[many]
        count = min(vocabulary, int(rows.top_k[of].max()))
        found, _, _ = _draw_from_first(logits, share, tp, rows, of, count)
        draw.tokens[many], draw.scores[many] = found.tokens, found.scores
    deep = (~enough & ~limited).nonzero().squeeze(1)
    if len(deep):
        found = _draw_deep(logits, share, tp, rows, chosen[deep], totals[deep])
        draw.tokens[deep], draw.scores[deep] = found.tokens, found.scores
    return draw


def _draw_from_first(
    logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, of: Tensor, count: int
) -> tuple[_Draw, Tensor, Tensor]:
    """A draw from the first `count` tokens; whether they were all that could be drawn, bool [m]; and for rows without
    top_k the logarithm of the sum over all that min-p leaves, float32 [m]."""
    top = _first(logits, of, share, tp, count)
    left = _limit(top.values, rows, of, sum(share.sizes))
    norm = left.scaled.masked_fill(~left.kept, NEVER).logsumexp(1)
    if not bool((left.complete | (rows.top_k[of] > 0)).all()):
        totals = _log_totals(logits, of, share, tp, rows.temperature[of], left.floor)
        norm = torch.where(left.complete, norm, totals)
    in_nucleus, reached = _nucleus(left, norm, rows.top_p[of])
    noisy = left.scaled + gumbel(rows.keys[of], top.ids.int())
    score, best = noisy.masked_fill_(~in_nucleus, NEVER).max(1)
    tokens = top.ids.gather(1, best.unsqueeze(1)).squeeze(1)
    return _Draw(tokens, score), left.complete | reached & (rows.top_k[of] == 0), norm


def _draw_deep(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, of: Tensor, totals: Tensor) -> _Draw:
    """Rows without top_k of which many tokens are left, so that sorting them would be slow.

    The draw is the best of all noisy scores that belongs to the tokens left. So the best one of all is taken; if the
    tokens ahead of it weigh too much, it is left out and with it all behind it, and the best one ahead of it is taken.
    What is left by top-p is accepted with probability top_p, so a row seldom needs a third try.
    totals: float32 [m], the logarithm of the sum over all that min-p leaves.
    """
    temperature, top_p = rows.temperature[of], rows.top_p[of]
    anything = torch.full_like(temperature, NEVER)
    floor = _first(logits, of, share, tp, 1).values[:, 0] / temperature + rows.min_p[of].log()
    draw = _Draw(torch.zeros_like(of), torch.zeros_like(temperature))
    limits = torch.full_like(of, BEHIND_ALL)
    pending = torch.arange(len(of), device=of.device)
    while len(pending):
        row = of[pending]
        found = _draw_ahead(logits, share, tp, rows, row, limits[pending])
        ranks = _ranks_of_tokens(logits, share, tp, row, found.tokens)
        value, _ = of_ranks(ranks)
        before = _log_totals(logits, row, share, tp, temperature[pending], anything[pending], ranks)
        fits = ((before - totals[pending]).exp() < top_p[pending]) | (top_p[pending] >= 1)
        fits &= value / temperature[pending] >= floor[pending]
        draw.tokens[pending], draw.scores[pending] = found.tokens, found.scores
        limits[pending] = ranks
        pending = pending[~(fits | (found.scores == NEVER))]
    return draw


def _ranks_of_tokens(logits: Tensor, share: VocabShare, tp: Axis, rows: Tensor, tokens: Tensor) -> Tensor:
    """`ranks_of` a token a row, whichever rank has it: int64 [m]."""
    column = tokens - share.start
    own = (column >= 0) & (column < logits.shape[1])
    ranks = torch.full_like(tokens, torch.iinfo(torch.int64).min)
    ranks[own] = ranks_of(logits[rows[own], column[own]], tokens[own])
    return tp.comm.all_gather(ranks.unsqueeze(1), [1] * tp.size, 1).amax(1)


@dataclass(frozen=True, slots=True)
class _Left:
    """What min-p and top-k leave of the first c tokens."""

    scaled: Tensor  # float32 [m, c]: logits over temperature
    floor: Tensor  # float32 [m]: the least that min-p leaves
    kept: Tensor  # bool [m, c]
    complete: Tensor  # bool [m]: beyond these tokens nothing is left


def _limit(values: Tensor, rows: SamplingRows, of: Tensor, vocabulary: int) -> _Left:
    count = values.shape[1]
    scaled = values / rows.temperature[of].unsqueeze(1)
    floor = scaled[:, 0] + rows.min_p[of].log()
    top_k = torch.where(rows.top_k[of] > 0, rows.top_k[of], vocabulary).clamp(max=vocabulary)
    possible = (scaled >= floor.unsqueeze(1)) & (scaled > NEVER)
    kept = possible & (torch.arange(count, device=values.device) < top_k.unsqueeze(1))
    return _Left(scaled, floor, kept, ~possible[:, -1] | (top_k <= count))


def _nucleus(left: _Left, norm: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Which of the tokens top-p leaves, bool [m, c], and whether it ends among them, bool [m]. norm: the logarithm of
    the sum over everything that is left before."""
    top_p = torch.where(top_p < 1, top_p, torch.inf).unsqueeze(1)  # sums may reach 1 before the last token
    probabilities = (left.scaled - norm.unsqueeze(1)).double().exp() * left.kept
    after = probabilities.cumsum(1)
    return left.kept & (after - probabilities < top_p), (after[:, -1:] >= top_p).squeeze(1)


def _doubtful(edits: Edits, keys: Tensor, vocabulary: int) -> Tensor:
    """Rows whose edits may forbid every token: no others do, and few of these. Int64 [d], the same on every rank."""
    count = len(keys)
    found = [torch.zeros(0, dtype=torch.int64, device=keys.device)]
    if edits.masks is not None:
        full = edits.masks.bits[:, : vocabulary // 32]  # not the word that may speak of tokens beyond the vocabulary
        least = (full != 0).sum(1)
        forbidden = torch.zeros(count, dtype=torch.int64, device=full.device)
        if edits.forbidden is not None:
            forbidden += torch.bincount(edits.forbidden.rows, minlength=count)
        found.append(edits.masks.rows[least <= forbidden[edits.masks.rows]])
    if edits.allowed is not None:
        found.append(edits.allowed.rows)
    if edits.forbidden is not None and len(edits.forbidden.rows) >= vocabulary:
        found.append((torch.bincount(edits.forbidden.rows, minlength=count) >= vocabulary).nonzero().squeeze(1))
    doubtful: Tensor = torch.cat(found).unique()
    return doubtful


def _lowest_permitted(edits: Edits, otherwise: Tensor, vocabulary: int) -> Tensor:
    """The lowest id that is not forbidden, and `otherwise`, int64 [m], where every one is."""
    restrictions = edits.restrictions()
    flat = torch.zeros((len(otherwise), vocabulary), device=otherwise.device)
    if restrictions is not None:
        apply_edits(flat, 0, restrictions)
    value, lowest = flat.max(1)
    return torch.where(value == 0, lowest, otherwise)
