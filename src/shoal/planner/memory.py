"""The memory that a rank needs, computed from the manifest before any process is started.

Activations are bounded by counting the tensors that exist at the fullest moment of a step. In the functions below,
"values" are numbers in the type of the activations, and all other quantities are in bytes.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.models.kv_format import KV_FORMATS, KVFormat
from shoal.models.manifest import ITEM_BYTES, Cut, Param, Shard, keeps_embedding, kv_block_bytes, weight_bytes
from shoal.models.spec import LatentSpec, ModelSpec, MoESpec
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.parallel.stages import MAX_PENDING_SENDS

SCORE_BYTES = 32 * 2**20  # the most attention scores that exist at a time; the same as in kernels.reference
PROMPT_ROWS = 64  # the most prompt tokens whose logits exist at a time; the same as in worker.runner
_FLOAT = 4  # bytes of a float32


@dataclass(frozen=True, slots=True)
class RankMemory:
    """The memory that one rank needs, in bytes."""

    weights: int
    activations: int  # for a context of length 0
    context_token: int  # activations in addition, for each token of the longest context
    block: int  # one KV block over all layers of the rank

    def kv_budget(self, memory: int, block_size: int, max_model_len: int | None) -> int:
        """Return how much of `memory` is left for the KV cache, in bytes; negative if there is not enough.

        The longest context has at most `max_model_len` tokens, and at most as many as the cache holds.
        """
        left = memory - self.weights - self.activations
        per_block = self.block + block_size * self.context_token
        shared = left * self.block // per_block if per_block else left
        return shared if max_model_len is None else max(shared, left - max_model_len * self.context_token)

    def with_draft(self, draft: "RankMemory") -> "RankMemory":
        """Return the needs of a rank that also runs a draft model.

        Both models use the same block table. The draft model runs while the logits of the first model still exist, so
        their activations add up; only one of them gathers a context at a time.
        """
        return RankMemory(
            weights=self.weights + draft.weights,
            activations=self.activations + draft.activations,
            context_token=max(self.context_token, draft.context_token),
            block=self.block + draft.block,
        )


@dataclass(frozen=True, slots=True)
class StepSize:
    """The size of the largest step."""

    tokens: int
    sampled: int  # rows of logits from which a token is drawn


def rank_memory(
    spec: ModelSpec,
    params: Sequence[Param],
    shard: Shard,
    *,
    dtype: str,
    device: str,
    block_size: int,
    step: StepSize,
    kv_dtype: str = "",
    replicas: int = 1,
) -> RankMemory:
    """Return the memory that the rank with this shard needs.

    Args:
        dtype: the type of weights and activations.
        step: the largest step that it must have room for.
        kv_dtype: the type of the KV cache; "": `dtype`.
        replicas: how many replicas hold whole experts together.
    """
    item, kv = ITEM_BYTES[dtype], KV_FORMATS[kv_dtype or dtype]
    kept = keeps_embedding(device, head=shard.stage.last)
    return RankMemory(
        weights=weight_bytes(spec, params, shard, item, embedding_kept=kept),
        activations=_activations(spec, shard, item, step, device, replicas)
        + _quantized_rows_bytes(params, shard, step.tokens * replicas),
        context_token=_context_token_bytes(spec, shard, item, step.tokens, None if kv.name == dtype else kv),
        block=kv_block_bytes(spec, shard, block_size, kv),
    )


def _activations(spec: ModelSpec, shard: Shard, item: int, step: StepSize, device: str, replicas: int) -> int:
    """Return an upper bound on the activations of a step at its fullest moment, in bytes.

    That moment is inside a layer, or at the end, when the logits exist. A stage that is not the first also holds the
    residual stream that it received, and a stage that is not the last those that it sent: they are kept for some steps.
    """
    stage = shard.stage
    values = max(_embedding_token_values(spec) if stage.first else 0, _layer_token_values(spec, shard))
    mixture = 0
    if spec.moe is not None and any(spec.moe.layers[i] for i in stage.layers):
        mixture = 2 * spec.hidden_size * item + _mixture_token_bytes(spec, spec.moe, shard, item, replicas)
    borders = spec.hidden_size * ((not stage.first) + MAX_PENDING_SENDS * (not stage.last))
    scores = SCORE_BYTES if any(spec.attention_of(i).softcap for i in stage.layers) else 0
    inside = step.tokens * max(values * item + _float32_token_bytes(spec, shard), mixture) + 3 * scores
    logits = (step.sampled + min(step.tokens, PROMPT_ROWS)) * _logit_row_bytes(shard, item, device) if stage.last else 0
    return max(inside, logits) + step.tokens * borders * item


def _quantized_rows_bytes(params: Sequence[Param], shard: Shard, rows: int) -> int:
    """Return the bytes of the widest rows of activations as a layer with quantized weights quantizes them.

    They exist beside the layer's input and output. An expert may get all rows of all replicas.
    """
    kept = ((shard.format_of(param), shard.param_shape(param)) for param in shard.held(params))
    return rows * max((each.row_bytes(shape[1]) for each, shape in kept if each is not None), default=0)


def _embedding_token_values(spec: ModelSpec) -> int:
    """Return the values per token that the embedding needs.

    These are, whichever is most: a row that is looked up, masked, and summed over ranks or scaled; that row and its
    projection to the hidden size; or a row, the row of its position, and the sum of both.
    """
    width, hidden = spec.embedding_width, spec.hidden_size
    return max(3 * width, width + 2 * hidden if width != hidden else 0, 3 * hidden)


def _layer_token_values(spec: ModelSpec, shard: Shard) -> int:
    """Return the values per token at the fullest moment of a layer.

    The residual stream and the input of the sublayer always exist. If attention and MLP read the same input, the inner
    values of the MLP exist too while attention runs. In addition there is what the current operation needs:

    - a norm: the sum and the result;
    - attention: queries, keys and values before and after the rotation; or its output before and after the projection,
      the sum over ranks and the sum with the bias;
    - the MLP: gates and values before and after the activation; or the activated values and, as for attention, the
      three results after them.
    """
    hidden = spec.hidden_size
    q, kv = len(shard.heads.q_range) * spec.head_dim, len(shard.heads.kv_ids) * spec.head_dim
    inner = len(shard.ranges[Cut.MLP])
    parallel = spec.layout in ("parallel", "parallel_one")
    held = 2 * hidden + (inner + hidden if parallel else 0)
    if isinstance(spec, FallbackSpec):
        held += 6 * hidden  # transformers' layers keep their inputs; the largest peak that was measured needed six more
    attention = max(2 * (q + 2 * kv) + q, 2 * q + 3 * hidden)
    if spec.latent is not None:
        attention = _latent_token_values(spec.latent, shard, hidden)
    return held + max(2 * hidden, attention, _mlp_token_values(spec, inner))


def _mlp_token_values(spec: ModelSpec, inner: int) -> int:
    return max((4 if spec.gated else 2) * inner, inner + 3 * spec.hidden_size)


def _latent_token_values(latent: LatentSpec, shard: Shard, hidden: int) -> int:
    """Return the values per token that latent attention needs, at the fullest of its moments.

    The moments are: a latent row before and after its norm and rotation; the queries of all heads, with the row that
    they are computed from; these queries, with the queries made from them that have the length of a cached row; the
    latter, with what they saw in the cache and the values made from that; the output projection.
    """
    heads = len(shard.heads.q_range)
    queries = heads * (latent.query_dim + latent.cached_dim + max(latent.cached_dim, 2 * latent.rope_dim))
    seen = heads * (2 * latent.cached_dim + latent.kv_rank + latent.value_dim)
    down = (latent.q_rank or 0) * 2 + heads * latent.query_dim
    return max(4 * latent.cached_dim, down, queries, seen, heads * latent.value_dim + 3 * hidden)


def _mixture_token_bytes(spec: ModelSpec, moe: MoESpec, shard: Shard, item: int, replicas: int) -> int:
    """Return the bytes per token that a mixture of experts needs beside what each layer holds.

    In the worst case the tokens of all replicas come to this rank, each for as many of this rank's experts as a token
    is sent to. For each such pair of token and expert there are the row of the token, its place in the sorted order,
    and whichever is most: the up projection before and after its parts are put together, the up projection and the
    activated values, or the activated values and the down projection before and after its parts are put together.
    """
    hidden, up = spec.hidden_size, 2 if spec.gated else 1
    inner = len(shard.ranges[Cut.EXPERT])
    held = moe.num_experts if shard.experts is None else len(shard.experts)
    pairs = replicas * min(moe.routing.top_k, held)
    pair = (hidden + max(2 * up * inner, (up + 1) * inner, inner + 2 * hidden)) * item + 6 * 8
    # Rows as they arrive from all replicas and as they are computed, and this rank's own. With several replicas also
    # the rows that are sent and returned, and a sum in float32.
    arrived = (2 * replicas + 1) * hidden * item
    if replicas > 1:
        arrived += (replicas + 1) * hidden * item + hidden * _FLOAT
    shared = _mlp_token_values(spec, len(shard.ranges[Cut.SHARED])) * item if moe.shared_size else 0
    routing = moe.num_experts * (item + 4 * _FLOAT + 8) + replicas * moe.routing.top_k * (8 + _FLOAT)
    return arrived + routing + max(pairs * pair, shared)


def _float32_token_bytes(spec: ModelSpec, shard: Shard) -> int:
    """Return the bytes per token of values that are computed in float32 before they are rounded.

    A norm needs three rows: the input, its squares or the normalized row, and that row times the weight. Heads that are
    normalized or rotated need the same.
    """
    changed = spec.qk_norm is not None or any(spec.attention_of(i).rope for i in shard.stage.layers)
    head = spec.latent.rope_dim if spec.latent is not None else spec.head_dim if changed else 0
    return 3 * _FLOAT * max(spec.hidden_size, len(shard.heads.q_range) * head)


def _logit_row_bytes(shard: Shard, item: int, device: str) -> int:
    """Return the bytes of a row of logits and its copies.

    These are the row as the output head computes it, its copy in float32, and one more copy in the sampler if
    log-probabilities are asked for. On a GPU, where PyTorch samples, there are also sort keys: a copy of the chosen
    rows, their bits twice, and 8 bytes twice.
    """
    sampler = 0 if device == "cpu" else 3 * _FLOAT + 2 * 8
    return len(shard.ranges[Cut.VOCAB]) * (item + 2 * _FLOAT + sampler)


def _context_token_bytes(spec: ModelSpec, shard: Shard, item: int, tokens: int, stored: KVFormat | None) -> int:
    """Return the bytes that attention needs for each token of context, when it computes a chunk of a prompt.

    One sequence is computed at a time. For each token of its context there are its slot, its key and value as they are
    cached, copies of them for every query head (not needed for a single KV head), and a column of the mask, as booleans
    and as numbers. Capped scores are computed in float32, for at least one query at a time.

    stored: the type of the KV cache, if it is another one than that of the activations. Then keys or values exist as
    they are stored beside those in the type of the activations, and before with their scales in float32.
    """
    q, kv = len(shard.heads.q_range), len(shard.heads.kv_ids)
    copied = 2 * q if kv > 1 else 0
    gathered = (copied + spec.cached_per_token * kv) * spec.head_dim * item + 4 * 8
    capped = any(spec.attention_of(i).softcap for i in shard.stage.layers)
    wide = _FLOAT * (2 * q * spec.head_dim + 3 * q) if capped else 0
    converted = 0
    if stored is not None:
        converted = kv * (stored.row_bytes(spec.head_dim) + (_FLOAT * spec.head_dim if stored.scale_bytes else 0))
    return gathered + converted + tokens * (1 + item) + wide
