"""Bytes that a rank needs, from the manifest alone: before any process is started."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import ConfigError
from shoal.models.manifest import Cut, Param, Shard, keeps_embedding, weight_bytes
from shoal.models.spec import ModelSpec

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_LOGITS_BYTES = 4


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


def rank_memory(
    spec: ModelSpec,
    params: Sequence[Param],
    shard: Shard,
    *,
    dtype: str,
    device: str,
    block_size: int,
    max_num_seqs: int,
    max_num_batched_tokens: int,
) -> RankMemory:
    item = DTYPE_BYTES[dtype]
    kept = keeps_embedding(spec, device, dtype)
    weights = weight_bytes(spec, params, shard, item, embedding_kept=kept)
    block = 2 * spec.num_layers * block_size * len(shard.heads.kv_ids) * spec.head_dim * item
    return RankMemory(
        weights=weights,
        activations=_activations(spec, shard, item, max_num_seqs, max_num_batched_tokens),
        context_token=_context_token(spec, shard, item, max_num_batched_tokens),
        block=block,
    )


def _activations(spec: ModelSpec, shard: Shard, item: int, max_num_seqs: int, tokens: int) -> int:
    """An upper bound on what a step holds at its fullest moment.

    That is inside a layer (the residual stream, what the sublayer reads and gives, and its inner values twice:
    queries and keys before and after the rotation, gates before and after the activation), or at the end, where the
    logits of every sampled row are there in float32, with one copy for the sampler.
    """
    qkv = len(shard.ranges[Cut.Q_HEADS]) + 2 * len(shard.ranges[Cut.KV_HEADS])
    inner = max(2 * qkv, 3 * len(shard.ranges[Cut.MLP]))
    layer = tokens * (4 * spec.hidden_size + inner) * item
    logits = min(max_num_seqs, tokens) * len(shard.ranges[Cut.VOCAB]) * (item + 2 * _LOGITS_BYTES)
    return max(layer, logits)


def _context_token(spec: ModelSpec, shard: Shard, item: int, tokens: int) -> int:
    """What a prompt in chunks gathers of its context, one sequence at a time: a key and a value for every query head,
    and a column of the mask as truth values and as numbers."""
    return 2 * len(shard.heads.q_range) * spec.head_dim * item + tokens * (1 + item)


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
