"""The sampler: it draws tokens from logits, as a pure function of the logits, the parameters and the key of each row.

The vocabulary is cut over the tensor-parallel ranks. Ranks exchange only their best candidates and not their logits:
the Gumbel-max trick (Gumbel, 1954; Maddison et al., NeurIPS 2014) turns a draw into an argmax, for which each rank
contributes one number. All ranks get the same tokens.

Rows are independent of each other. Several rows may belong to one sequence; each has its own key.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shoal.kernels.gumbel_noise import gumbel
from shoal.kernels.sampling import NO_LIMIT, pack_tokens, sampling_kernels, unpack_tokens
from shoal.parallel.mesh import Axis
from shoal.worker.logit_edits import NEVER, Edits, apply_edits

_TOP_CANDIDATES = 256  # how many of the likeliest tokens are examined first; most nuclei are smaller


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """The sampling parameters of the m rows in which a token is drawn."""

    temperature: Tensor  # float32 [m]; 0: greedy
    top_k: Tensor  # int64 [m]; 0: no limit
    top_p: Tensor  # float32 [m]
    min_p: Tensor  # float32 [m]; 0: no limit
    keys: Tensor  # int32 [m, 2]: the keys of the random numbers
    greedy: bool  # True: all rows are greedy
    truncated: Sequence[int]  # rows that are not greedy and have a top_k, top_p or min_p
    logprobs: int  # the most log-probabilities that any row wants; -1: no row wants any
    edits: Edits | None = None

    @property
    def only_tops(self) -> bool:
        """True if nothing but the top token of each row is needed."""
        return self.greedy and self.edits is None and self.logprobs < 0


@dataclass(frozen=True, slots=True)
class Logprobs:
    """The log-probabilities of one token in each of m rows, and of the likeliest tokens."""

    chosen: Tensor  # float32 [m]: the log-probability of the token
    ranks: Tensor  # int64 [m]: its rank, which is 1 + the number of tokens with a larger logit
    ids: Tensor  # int64 [m, count]: the likeliest tokens, equally likely ones by rising id
    values: Tensor  # float32 [m, count]: their log-probabilities


@dataclass(frozen=True, slots=True)
class VocabShare:
    """The part of the vocabulary for which a rank has logits."""

    start: int  # the first token id of this rank
    sizes: tuple[int, ...]  # by rank: the number of tokens


@dataclass(frozen=True, slots=True)
class _Draw:
    tokens: Tensor  # int64 [m]
    scores: Tensor  # float32 [m]; -inf: no token could be drawn


def sample(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows) -> Tensor:
    """Draw a token in each row. Return the token ids: int64 [m].

    The edits of the rows are applied here, in place, or to a copy if `rows.logprobs` says that the logits are needed
    afterwards. If all logits of a row are -inf, it draws the lowest id that its edits do not forbid; if they forbid all
    ids, it draws the likeliest token before the edits.

    Args:
        logits: [m, share.sizes[tp.rank]], float32; or also bfloat16 if all rows are greedy and without edits.
    """
    if rows.edits is None:
        return _draw(logits, share, tp, rows).tokens
    maybe_empty = _maybe_empty_rows(rows.edits, rows.keys, sum(share.sizes))
    likeliest = _argmax(logits[maybe_empty], share, tp).tokens if len(maybe_empty) else maybe_empty
    if rows.logprobs >= 0:
        logits = logits.clone()
    apply_edits(logits, share.start, rows.edits)
    draw = _draw(logits, share, tp, rows)
    empty = draw.scores == NEVER
    if bool(empty.any()):
        before = torch.zeros_like(draw.tokens).index_copy(0, maybe_empty, likeliest)
        return torch.where(empty, _lowest_allowed(rows.edits, before, sum(share.sizes)), draw.tokens)
    return draw.tokens


def sample_top(values: Tensor, ids: Tensor, tp: Axis) -> Tensor:
    """Return the token with the largest logit in each row: int64 [m]. It is what `sample` draws in greedy rows.

    Args:
        values: float32 [m]: the largest logit of this rank.
        ids: int64 [m]: its token, the lowest of those that have this logit.
    """
    return _best_of_ranks(values, ids, tp).tokens


def logprobs(logits: Tensor, share: VocabShare, tp: Axis, tokens: Tensor, count: int) -> Logprobs:
    """Return the log-probabilities of one token in each row, and of the `count` likeliest tokens.

    Args:
        logits: float32 [m, share.sizes[tp.rank]].
        tokens: int64 [m], ids in the vocabulary.
        count: may be larger than the vocabulary, which then sets the limit.
    """
    everything = torch.arange(len(logits), device=logits.device)
    ones = logits.new_ones(len(logits))
    total = _logsumexp(logits, everything, share, tp, ones, logits.new_full((len(logits),), NEVER))
    local = tokens - share.start
    own = (local >= 0) & (local < logits.shape[1])
    if logits.shape[1]:
        value = logits.gather(1, local.clamp(0, logits.shape[1] - 1).unsqueeze(1)).squeeze(1)
    else:
        value = logits.new_zeros(len(logits))
    chosen = tp.comm.all_gather(value.masked_fill(~own, NEVER).unsqueeze(1), [1] * tp.size, 1).amax(1)
    above = tp.comm.all_reduce(sampling_kernels(logits).count_above(logits, chosen))
    top = _top(logits, everything, share, tp, count)
    return Logprobs(chosen - total, above + 1, top.ids, top.values - total.unsqueeze(1))


def _draw(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows) -> _Draw:
    """Draw a token in each row. Rows are greedy, draw from all tokens, or are truncated."""
    if rows.greedy:
        return _argmax(logits, share, tp)
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
    return _argmax(logits[chosen], share, tp)


def _draw_free(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, chosen: Tensor) -> _Draw:
    """Draw from the whole vocabulary."""
    return _draw_within(logits, share, tp, rows, chosen, None)


def _draw_within(
    logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, of: Tensor, limits: Tensor | None
) -> _Draw:
    """Draw from the tokens that are larger than the limits, which are packed tokens; None: from all tokens."""
    if logits.shape[1] == 0:
        return _best_of_ranks(*_nothing(logits, len(of)), tp)
    kernels = sampling_kernels(logits)
    return _best_of_ranks(*kernels.draw(logits, share.start, of, rows.temperature[of], rows.keys[of], limits), tp)


def _argmax(logits: Tensor, share: VocabShare, tp: Axis) -> _Draw:
    """Return the token with the largest logit over all ranks. Of equal logits, the lowest id is taken."""
    if logits.shape[1] == 0:
        return _best_of_ranks(*_nothing(logits, len(logits)), tp)
    return _best_of_ranks(*sampling_kernels(logits).argmax(logits, share.start), tp)


def _nothing(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the candidates of a rank that has no share of the vocabulary."""
    return logits.new_full((count,), NEVER), torch.zeros(count, dtype=torch.int64, device=logits.device)


def _best_of_ranks(scores: Tensor, ids: Tensor, tp: Axis) -> _Draw:
    """Return the best of the ranks' candidates, which are scores, float32 [m], and ids, int64 [m], of each rank.

    Of equal scores, that of the first rank is taken, which has the lowest ids.
    """
    if tp.size == 1:
        return _Draw(ids, scores)
    pair = torch.stack([scores.double(), ids.double()], 1)
    pairs = tp.comm.all_gather(pair, [2] * tp.size, 1).view(len(scores), tp.size, 2)
    score, winner = pairs[:, :, 0].max(1, keepdim=True)
    return _Draw(pairs[:, :, 1].gather(1, winner).squeeze(1).long(), score.squeeze(1).float())


def _logsumexp(
    logits: Tensor,
    rows: Tensor,
    share: VocabShare,
    tp: Axis,
    temperature: Tensor,
    floor: Tensor,
    limits: Tensor | None = None,
) -> Tensor:
    """Compute `SamplingKernels.logsumexp` over the whole vocabulary, which is split over the ranks."""
    local = sampling_kernels(logits).logsumexp(logits, share.start, rows, temperature, floor, limits)
    return tp.comm.all_gather(local.unsqueeze(1), [1] * tp.size, 1).logsumexp(1) if tp.size > 1 else local


@dataclass(frozen=True, slots=True)
class _TopTokens:
    """Tokens ordered by falling logit, equal logits by rising id."""

    values: Tensor  # float32 [m, c]
    ids: Tensor  # int64 [m, c]


def _top(logits: Tensor, rows: Tensor, share: VocabShare, tp: Axis, count: int) -> _TopTokens:
    """Return the `count` likeliest tokens of the whole vocabulary, or all tokens if it has fewer."""
    packed = sampling_kernels(logits).top(logits, share.start, rows, count)
    if tp.size > 1:
        packed = tp.comm.all_gather(packed, [min(size, count) for size in share.sizes], 1)
        packed = packed.sort(dim=1, descending=True).values[:, :count]
    return _TopTokens(*unpack_tokens(packed))


def _draw_truncated(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, chosen: Tensor) -> _Draw:
    """Apply min-p, top-k, then top-p to the rest (the nucleus of Holtzman et al., ICLR 2020), and draw.

    The tokens that remain are always the likeliest ones. Nearly always they are among a few candidates.
    """
    vocabulary = sum(share.sizes)
    draw, enough, totals = _draw_from_top(logits, share, tp, rows, chosen, min(vocabulary, _TOP_CANDIDATES))
    if bool(enough.all()):
        return draw
    limited = rows.top_k[chosen] > 0
    many = (~enough & limited).nonzero().squeeze(1)
    if len(many):
        of = chosen[many]
        count = min(vocabulary, int(rows.top_k[of].max()))
        found, _, _ = _draw_from_top(logits, share, tp, rows, of, count)
        draw.tokens[many], draw.scores[many] = found.tokens, found.scores
    deep = (~enough & ~limited).nonzero().squeeze(1)
    if len(deep):
        found = _draw_deep(logits, share, tp, rows, chosen[deep], totals[deep])
        draw.tokens[deep], draw.scores[deep] = found.tokens, found.scores
    return draw


def _draw_from_top(
    logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, of: Tensor, count: int
) -> tuple[_Draw, Tensor, Tensor]:
    """Draw from the `count` likeliest tokens.

    Returns:
        The draw; whether no other token could have been drawn: bool [m]; and, for rows without top_k, the logarithm of
        the sum over all tokens that min-p leaves: float32 [m].
    """
    top = _top(logits, of, share, tp, count)
    rest = _truncate(top.values, rows, of, sum(share.sizes))
    norm = rest.scaled.masked_fill(~rest.kept, NEVER).logsumexp(1)
    if not bool((rest.complete | (rows.top_k[of] > 0)).all()):
        totals = _logsumexp(logits, of, share, tp, rows.temperature[of], rest.floor)
        norm = torch.where(rest.complete, norm, totals)
    in_nucleus, reached = _nucleus(rest, norm, rows.top_p[of])
    noisy = rest.scaled + gumbel(rows.keys[of], top.ids.int())
    score, best = noisy.masked_fill_(~in_nucleus, NEVER).max(1)
    tokens = top.ids.gather(1, best.unsqueeze(1)).squeeze(1)
    return _Draw(tokens, score), rest.complete | reached & (rows.top_k[of] == 0), norm


def _draw_deep(logits: Tensor, share: VocabShare, tp: Axis, rows: SamplingRows, of: Tensor, totals: Tensor) -> _Draw:
    """Draw in rows without top_k for which many tokens remain, so that sorting them would be slow.

    The result must be the token with the best noisy score among those that remain. So the one with the best score of
    all is tried first. If the likelier tokens have so much probability that top-p leaves it out, the next try is the
    one with the best score among these likelier tokens, and so on. A try succeeds with probability top_p, so a row
    seldom needs a third one.

    Args:
        totals: float32 [m]: the logarithm of the sum over all tokens that min-p leaves.
    """
    temperature, top_p = rows.temperature[of], rows.top_p[of]
    no_floor = torch.full_like(temperature, NEVER)
    floor = _top(logits, of, share, tp, 1).values[:, 0] / temperature + rows.min_p[of].log()
    draw = _Draw(torch.zeros_like(of), torch.zeros_like(temperature))
    limits = torch.full_like(of, NO_LIMIT)
    pending = torch.arange(len(of), device=of.device)
    while len(pending):
        row = of[pending]
        found = _draw_within(logits, share, tp, rows, row, limits[pending])
        packed = _packed_tokens(logits, share, tp, row, found.tokens)
        value, _ = unpack_tokens(packed)
        before = _logsumexp(logits, row, share, tp, temperature[pending], no_floor[pending], packed)
        fits = ((before - totals[pending]).exp() < top_p[pending]) | (top_p[pending] >= 1)
        fits &= value / temperature[pending] >= floor[pending]
        draw.tokens[pending], draw.scores[pending] = found.tokens, found.scores
        limits[pending] = packed
        pending = pending[~(fits | (found.scores == NEVER))]
    return draw


def _packed_tokens(logits: Tensor, share: VocabShare, tp: Axis, rows: Tensor, tokens: Tensor) -> Tensor:
    """Pack one token of each row with its logit, which any of the ranks may have: int64 [m]."""
    column = tokens - share.start
    own = (column >= 0) & (column < logits.shape[1])
    packed = torch.full_like(tokens, torch.iinfo(torch.int64).min)
    packed[own] = pack_tokens(logits[rows[own], column[own]], tokens[own])
    return tp.comm.all_gather(packed.unsqueeze(1), [1] * tp.size, 1).amax(1)


@dataclass(frozen=True, slots=True)
class _Truncated:
    """The c likeliest tokens after min-p and top-k."""

    scaled: Tensor  # float32 [m, c]: logits / temperature
    floor: Tensor  # float32 [m]: the lowest scaled logit that min-p keeps
    kept: Tensor  # bool [m, c]: the tokens that remain
    complete: Tensor  # bool [m]: no other tokens of the vocabulary remain


def _truncate(values: Tensor, rows: SamplingRows, of: Tensor, vocabulary: int) -> _Truncated:
    """Apply min-p and top-k to the likeliest tokens of the rows `of`. values: float32 [m, c], their logits."""
    count = values.shape[1]
    scaled = values / rows.temperature[of].unsqueeze(1)
    floor = scaled[:, 0] + rows.min_p[of].log()
    top_k = torch.where(rows.top_k[of] > 0, rows.top_k[of], vocabulary).clamp(max=vocabulary)
    possible = (scaled >= floor.unsqueeze(1)) & (scaled > NEVER)
    kept = possible & (torch.arange(count, device=values.device) < top_k.unsqueeze(1))
    return _Truncated(scaled, floor, kept, ~possible[:, -1] | (top_k <= count))


def _nucleus(rest: _Truncated, norm: Tensor, top_p: Tensor) -> tuple[Tensor, Tensor]:
    """Apply top-p to the tokens that remain.

    Args:
        norm: float32 [m]: the logarithm of the sum over all tokens that remain.

    Returns:
        The tokens in the nucleus: bool [m, c]; and whether the nucleus ends among the c tokens: bool [m].
    """
    top_p = torch.where(top_p < 1, top_p, torch.inf).unsqueeze(1)  # rounded sums may reach 1 before the last token
    probabilities = (rest.scaled - norm.unsqueeze(1)).double().exp() * rest.kept
    after = probabilities.cumsum(1)
    return rest.kept & (after - probabilities < top_p), (after[:, -1:] >= top_p).squeeze(1)


def _maybe_empty_rows(edits: Edits, keys: Tensor, vocabulary: int) -> Tensor:
    """Return the rows whose edits may forbid all tokens: int64 [d], the same on every rank.

    The edits of other rows cannot forbid all tokens. Most of the returned rows are not empty either; this is only a
    cheap check.
    """
    count = len(keys)
    found = [torch.zeros(0, dtype=torch.int64, device=keys.device)]
    if edits.masks is not None:
        full = edits.masks.bits[:, : vocabulary // 32]  # without the word that has bits beyond the vocabulary too
        least = (full != 0).sum(1)
        forbidden = torch.zeros(count, dtype=torch.int64, device=full.device)
        if edits.forbidden is not None:
            forbidden += torch.bincount(edits.forbidden.rows, minlength=count)
        found.append(edits.masks.rows[least <= forbidden[edits.masks.rows]])
    if edits.allowed is not None:
        found.append(edits.allowed.rows)
    if edits.forbidden is not None and len(edits.forbidden.rows) >= vocabulary:
        found.append((torch.bincount(edits.forbidden.rows, minlength=count) >= vocabulary).nonzero().squeeze(1))
    rows: Tensor = torch.cat(found).unique()
    return rows


def _lowest_allowed(edits: Edits, otherwise: Tensor, vocabulary: int) -> Tensor:
    """Return the lowest id that is not forbidden in each row, or that of `otherwise`, int64 [m], if all are."""
    restrictions = edits.restrictions()
    flat = torch.zeros((len(otherwise), vocabulary), device=otherwise.device)
    if restrictions is not None:
        apply_edits(flat, 0, restrictions)
    value, lowest = flat.max(1)
    return torch.where(value == 0, lowest, otherwise)
