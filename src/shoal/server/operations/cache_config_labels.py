"""The labels of `vllm:cache_config_info`. Where Shoal lacks a feature, the value is vLLM's for "unused"."""

from shoal.config.engine_options import CacheOptions, EngineOptions
from shoal.wire.engine import EngineStats

_ABSENT = {
    "calculate_kv_scales": "False",
    "cpu_kvcache_space_bytes": "None",
    "cpu_offload_gb": "0",
    "is_attention_free": "False",
    "kv_cache_dtype_skip_layers": "[]",
    "kv_offloading_backend": "None",
    "kv_offloading_size": "None",
    "kv_sharing_fast_prefill": "False",
    "mamba_block_size": "None",
    "mamba_cache_dtype": "auto",
    "mamba_cache_mode": "none",
    "mamba_page_size_padded": "None",
    "mamba_ssm_cache_dtype": "auto",
    "num_cpu_blocks": "None",
    "num_gpu_blocks_override": "None",
    "prefix_caching_hash_algo": "None",  # tokens are compared, not hashes
    "sliding_window": "None",
    "swap_space": "0",
    "swap_space_bytes": "0",
}
NAMES = (
    *("block_size", "num_gpu_blocks", "kv_cache_size_tokens", "kv_cache_max_concurrency"),
    *("enable_prefix_caching", "gpu_memory_utilization", "kv_cache_memory_bytes", "user_specified_block_size"),
    "cache_dtype",
    *_ABSENT,
)


def values(options: EngineOptions, stats: EngineStats) -> tuple[str, ...]:
    """Return the values of the labels `NAMES` for one replica."""
    cache = options.cache
    tokens = stats.num_blocks * stats.block_size
    found: tuple[object, ...] = (
        *(stats.block_size, stats.num_blocks, tokens, tokens / max(stats.max_model_len, 1)),
        *(cache.enable_prefix_caching, cache.gpu_memory_utilization, cache.kv_cache_memory_bytes),
        *(cache.block_size != CacheOptions().block_size, cache.kv_cache_dtype),
        *_ABSENT.values(),
    )
    return tuple(str(value) for value in found)
