"""Bytes that a rank needs, from the manifest alone: before any process is started."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shoal.errors import ConfigError
from shoal.models.checkpoint import TensorEntry
from shoal.models.fallback import FallbackSpec
from shoal.models.manifest import ITEM_BYTES, Cut, Param, Shard, keeps_embedding, kv_block_bytes, weight_bytes
from shoal.models.spec import ModelSpec

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
    stored: Mapping[str, TensorEntry],
    shard: Shard,
    *,
    dtype: str,
    device: str,
    block_size: int,
    step: StepSize,
) -> RankMemory:
    """`stored`: the checkpoint's tensors; empty where weights are made up."""
    item = ITEM_BYTES[dtype]
    kept = keeps_embedding(params, stored, device, dtype)
    return RankMemory(
        weights=weight_bytes(spec, params, shard, item, embedding_kept=kept),
        activations=_activations(spec, shard, item, step, device),
        context_token=_context_token(spec, shard, item, step.tokens),
        block=kv_block_bytes(spec, shard, block_size, item),
    )


def _activations(spec: ModelSpec, shard: Shard, item: int, step: StepSize, device: str) -> int:
    """An upper bound on what a step holds at its fullest moment: inside a layer, or at the end, with the logits."""
    token = max(_embedding_token(spec), _layer_token(spec, shard)) * item + _wide_token(spec, shard)
    scores = SCORE_BYTES if any(spec.attention_of(i).softcap for i in range(spec.num_layers)) else 0
    logits = (step.sampled + min(step.tokens, PROMPT_ROWS)) * _logit_row(shard, item, device)
    return max(step.tokens * token + 3 * scores, logits)


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
    mlp = max((4 if spec.gated else 2) * inner, inner + 3 * hidden)
    return held + max(2 * hidden, attention, mlp)


def _wide_token(spec: ModelSpec, shard: Shard) -> int:
    """Bytes a token of what is computed in float32 before it is rounded: a norm's row three times (itself, its
    squares or its outcome, that times the weight), and so the heads that are normed or rotated."""
    heads = len(shard.heads.q_range) * spec.head_dim
    turned = spec.qk_norm is not None or any(spec.attention_of(i).rope for i in range(spec.num_layers))
    return 3 * _FLOAT * max(spec.hidden_size, heads if turned else 0)


def _logit_row(shard: Shard, item: int, device: str) -> int:
    """Bytes of a row of logits and its copies: as the head gives it, in float32 (capped in place), once more for the
    sampler where log-probabilities are asked for. On a GPU, where PyTorch samples, integers that order it too: the
    copy of the chosen rows, its bits twice, and eight bytes twice."""
    sampler = 0 if device == "cpu" else 3 * _FLOAT + 2 * 8
    return len(shard.ranges[Cut.VOCAB]) * (item + 2 * _FLOAT + sampler)


def _context_token(spec: ModelSpec, shard: Shard, item: int, tokens: int) -> int:
    """What a prompt in chunks gathers of its context, one sequence at a time: where a token lies, a key and a value as
    they are cached and for every query head, and a column of the mask as truth values and as numbers. Scores that are
    bent are computed in float32, at least one query's at a time."""
    q, kv = len(shard.heads.q_range), len(shard.heads.kv_ids)
    gathered = 2 * (q + kv) * spec.head_dim * item + 4 * 8
    capped = any(spec.attention_of(i).softcap for i in range(spec.num_layers))
    wide = _FLOAT * (2 * q * spec.head_dim + 3 * q) if capped else 0
    return gathered + tokens * (1 + item) + wide


def require_capacity(num_blocks: int, block_size: int, max_model_len: int) -> None:
    """Refuses a KV cache that can't hold one request.

    Raises:
        ConfigError: it says how many tokens are missing, and which flags help.
    """
    if num_blocks * block_size < max_model_len:
        raise ConfigError(
            f"the KV cache has room for {num_blocks * block_size} tokens ({num_blocks} blocks of {block_size}), "
            f"{max_model_len - num_blocks * block_size} fewer than one request of --max-model-len {max_model_len}: "
            "lower --max-model-len, or raise --device-memory or --kv-cache-memory-bytes"
        )
