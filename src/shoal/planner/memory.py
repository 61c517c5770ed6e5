"""Bytes that a rank needs, from the manifest alone: before any process is started."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.models.manifest import ITEM_BYTES, Cut, Param, Shard, keeps_embedding, kv_block_bytes, weight_bytes
from shoal.models.spec import LatentSpec, ModelSpec, MoESpec
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.parallel.stages import STREAMS_ON_WAY

SCORE_BYTES = 32 * 2**20  # attention scores that are written out at a time: kernels.reference's
PROMPT_ROWS = 64  # tokens of a prompt whose logits are there at a time: worker.runner's
_FLOAT = 4


@dataclass(frozen=True, slots=True)
class RankMemory:
    """One rank's needs in bytes; `block` is one KV block over all layers."""

    weights: int
    activations: int  # whatever the contexts' lengths
    context_token: int  # more, for each token of the longest context
    block: int

    def kv_budget(self, memory: int, block_size: int, max_model_len: int | None) -> int:
        """Bytes for the KV cache that leave room for all else; negative if there is none.

        No context is longer than `max_model_len`, nor than the cache.
        """
        left = memory - self.weights - self.activations
        per_block = self.block + block_size * self.context_token
        shared = left * self.block // per_block if per_block else left
        return shared if max_model_len is None else max(shared, left - max_model_len * self.context_token)

    def with_draft(self, draft: "RankMemory") -> "RankMemory":
        """Of two models under one block table, the second of which runs while the first one's logits are there."""
        return RankMemory(
            weights=self.weights + draft.weights,
            activations=self.activations + draft.activations,
            context_token=max(self.context_token, draft.context_token),
            block=self.block + draft.block,
        )


@dataclass(frozen=True, slots=True)
class StepSize:
    """The most that a step holds."""

    tokens: int
    sampled: int  # tokens that are drawn


def rank_memory(
    spec: ModelSpec,
    params: Sequence[Param],
    shard: Shard,
    *,
    dtype: str,
    device: str,
    block_size: int,
    step: StepSize,
    replicas: int = 1,
) -> RankMemory:
    """`replicas` hold whole experts together."""
    item = ITEM_BYTES[dtype]
    kept = keeps_embedding(device, head=shard.stage.last)
    return RankMemory(
        weights=weight_bytes(spec, params, shard, item, embedding_kept=kept),
        activations=_activations(spec, shard, item, step, device, replicas),
        context_token=_context_token(spec, shard, item, step.tokens),
        block=kv_block_bytes(spec, shard, block_size, item),
    )


def _activations(spec: ModelSpec, shard: Shard, item: int, step: StepSize, device: str, replicas: int) -> int:
    """An upper bound on what a step holds at its fullest moment: inside a layer, or at the end, with the logits.

    Between stages a step's residual stream is received, and kept for some steps after it was sent.
    """
    stage = shard.stage
    values = max(_embedding_token(spec) if stage.first else 0, _layer_token(spec, shard))
    mixture = 0
    if spec.moe is not None and any(spec.moe.layers[i] for i in stage.layers):
        mixture = 2 * spec.hidden_size * item + _mixture_token(spec, spec.moe, shard, item, replicas)
    borders = spec.hidden_size * ((not stage.first) + STREAMS_ON_WAY * (not stage.last))
    scores = SCORE_BYTES if any(spec.attention_of(i).softcap for i in stage.layers) else 0
    inside = step.tokens * max(values * item + _wide_token(spec, shard), mixture) + 3 * scores
    logits = (step.sampled + min(step.tokens, PROMPT_ROWS)) * _logit_row(shard, item, device) if stage.last else 0
    return max(inside, logits) + step.tokens * borders * item


def _embedding_token(spec: ModelSpec) -> int:
    """Values a token at the start: its row looked up, masked and summed over ranks, or scaled; led into the hidden
    size; with its position's row, and the sum of both."""
    width, hidden = spec.embedding_width, spec.hidden_size
    return max(3 * width, width + 2 * hidden if width != hidden else 0, 3 * hidden)


def _layer_token(spec: ModelSpec, shard: Shard) -> int:
    """Values a token, in the type of the activations, at a layer's fullest moment.

    The residual stream and what the sublayer reads are always there, and where both sublayers read the same stream,
    the MLP's inner values while attention runs. A norm adds the sum and its outcome; attention queries, keys and
    values before and after the rotation, or what it saw before and after it is put together, summed over ranks and
    given a bias; the MLP its gates and values before and after the activation, or the latter and the outcome, likewise.
    """
    hidden = spec.hidden_size
    q, kv = len(shard.heads.q_range) * spec.head_dim, len(shard.heads.kv_ids) * spec.head_dim
    inner = len(shard.ranges[Cut.MLP])
    parallel = spec.layout in ("parallel", "parallel_one")
    held = 2 * hidden + (inner + hidden if parallel else 0)
    if isinstance(spec, FallbackSpec):  # its layers keep what they were given; the largest peak measured took six more
        held += 6 * hidden
    attention = max(2 * (q + 2 * kv) + q, 2 * q + 3 * hidden)
    if spec.latent is not None:
        attention = _latent_token(spec.latent, shard, hidden)
    return held + max(2 * hidden, attention, _mlp_token(spec, inner))


def _mlp_token(spec: ModelSpec, inner: int) -> int:
    return max((4 if spec.gated else 2) * inner, inner + 3 * spec.hidden_size)


def _latent_token(latent: LatentSpec, shard: Shard, hidden: int) -> int:
    """Values a token in latent attention: a latent row before and after its norm and rotation, or every head's query
    with what is made of it, then queries as long as what is cached and what they saw, or what comes of that."""
    heads = len(shard.heads.q_range)
    queries = heads * (latent.query_dim + latent.cached_dim + max(latent.cached_dim, 2 * latent.rope_dim))
    seen = heads * (2 * latent.cached_dim + latent.kv_rank + latent.value_dim)
    down = (latent.q_rank or 0) * 2 + heads * latent.query_dim
    return max(4 * latent.cached_dim, down, queries, seen, heads * latent.value_dim + 3 * hidden)


def _mixture_token(spec: ModelSpec, moe: MoESpec, shard: Shard, item: int, replicas: int) -> int:
    """Bytes a token in a mixture of experts, beside what a layer holds anyway.

    The most that can come to a rank are the tokens of all replicas, each for as many of its experts as a token takes.
    For each of these pairs there are the token's row, and what comes up before and after it is put together, or that
    activated, or what goes down likewise; and where it is sorted to.
    """
    hidden, up = spec.hidden_size, 2 if spec.gated else 1
    inner = len(shard.ranges[Cut.EXPERT])
    held = moe.num_experts if shard.experts is None else len(shard.experts)
    pairs = replicas * min(moe.routing.top_k, held)
    pair = (hidden + max(2 * up * inner, (up + 1) * inner, inner + 2 * hidden)) * item + 6 * 8
    # What arrived, as it came and as rows, and what goes back; on the way in and out this rank's own, and a wide sum.
    arrived = (2 * replicas + 1) * hidden * item
    if replicas > 1:
        arrived += (replicas + 1) * hidden * item + hidden * _FLOAT
    shared = _mlp_token(spec, len(shard.ranges[Cut.SHARED])) * item if moe.shared_size else 0
    routing = moe.num_experts * (item + 4 * _FLOAT + 8) + replicas * moe.routing.top_k * (8 + _FLOAT)
    return arrived + routing + max(pairs * pair, shared)


def _wide_token(spec: ModelSpec, shard: Shard) -> int:
    """Bytes a token of what is computed in float32 before it is rounded: a norm's row three times (itself, its
    squares or its outcome, that times the weight), and so the heads that are normed or rotated."""
    turned = spec.qk_norm is not None or any(spec.attention_of(i).rope for i in shard.stage.layers)
    head = spec.latent.rope_dim if spec.latent is not None else spec.head_dim if turned else 0
    return 3 * _FLOAT * max(spec.hidden_size, len(shard.heads.q_range) * head)


def _logit_row(shard: Shard, item: int, device: str) -> int:
    """Bytes of a row of logits and its copies: as the head gives it, in float32 (capped in place), once more for the
    sampler where log-probabilities are asked for. On a GPU, where PyTorch samples, integers that order it too: the
    copy of the chosen rows, its bits twice, and eight bytes twice."""
    sampler = 0 if device == "cpu" else 3 * _FLOAT + 2 * 8
    return len(shard.ranges[Cut.VOCAB]) * (item + 2 * _FLOAT + sampler)


def _context_token(spec: ModelSpec, shard: Shard, item: int, tokens: int) -> int:
    """What a prompt in chunks gathers of its context, one sequence at a time: where a token lies, a key and a value as
    they are cached and, but from a single KV head, for every query head, and a column of the mask as truth values and
    as numbers. Scores that are bent are computed in float32, at least one query's at a time."""
    q, kv = len(shard.heads.q_range), len(shard.heads.kv_ids)
    copied = 2 * q if kv > 1 else 0
    gathered = (copied + spec.cached_per_token * kv) * spec.head_dim * item + 4 * 8
    capped = any(spec.attention_of(i).softcap for i in shard.stage.layers)
    wide = _FLOAT * (2 * q * spec.head_dim + 3 * q) if capped else 0
    return gathered + tokens * (1 + item) + wide
