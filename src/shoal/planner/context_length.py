"""The context length: how many tokens a prompt and its output may have together.

The model, the draft model, the user and the KV cache each set a limit; the smallest one counts.
"""

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.models.spec import ModelSpec


def context_length(
    options: EngineOptions,
    spec: ModelSpec,
    draft: ModelSpec | None,
    blocks: int | None,
    reasons: list[str],
) -> int:
    """Return the most tokens that a prompt and its output may have together.

    Args:
        blocks: the number of blocks of the KV cache; None while it is not known.
        reasons: lines for the log; this function appends its own.

    Raises:
        ConfigError: the user asks for more than the model, the draft model or the KV cache allows.
    """
    wanted, size = options.model_options.max_model_len, options.cache.block_size
    _check_positions(wanted, spec)
    longest = wanted or spec.max_positions
    drafts = longest if draft is None else min(draft.max_positions, draft.steady_positions or draft.max_positions)
    if drafts < longest:
        if wanted is not None:
            raise ConfigError(
                f"--max-model-len {wanted} is more than the draft model's {drafts} positions: lower it, or choose "
                "another draft model"
            )
        reasons.append(f"max_model_len {drafts}, not the model's {longest}: the draft model has no more")
        longest = drafts
    if blocks is None:
        return longest
    if wanted is not None or blocks < 1:
        require_capacity(blocks, size, longest)
    fits = tokens_that_fit(longest, blocks, size)
    if fits < longest:
        reasons.append(f"max_model_len {fits}, not the model's {longest}: the KV cache holds no more")
    return fits


def _check_positions(wanted: int | None, spec: ModelSpec) -> None:
    """Check that the model can compute texts of the wanted length.

    Raises:
        ConfigError: the model has fewer positions, or its rope scaling is not supported for texts of this length.
    """
    if wanted is not None and wanted > spec.max_positions:
        by = f" ({spec.stretched_by})" if spec.stretched_by else ""
        raise ConfigError(
            f"--max-model-len {wanted} is more than the model's {spec.max_positions} positions{by}: lower it, or "
            "give the model more positions by a rope_scaling in --hf-overrides, if it was trained for that"
        )
    steady = spec.steady_positions
    if steady is not None and (wanted or spec.max_positions) > steady:
        asked = f"--max-model-len {wanted} is" if wanted else f"the model's {spec.max_positions} positions are"
        raise ConfigError(
            f"{asked} more than its original {steady}: in longer texts its rope scaling changes the angles of all "
            f"tokens, which is not supported; use --max-model-len {steady} or less"
        )


def tokens_that_fit(longest: int, num_blocks: int, block_size: int) -> int:
    """Return the smaller of `longest` and the number of tokens that the KV cache holds."""
    return min(longest, num_blocks * block_size)


def require_capacity(num_blocks: int, block_size: int, max_model_len: int) -> None:
    """Check that the KV cache can hold one request of the maximum length.

    Raises:
        ConfigError: it cannot; the message says how many tokens are missing, and which flags help.
    """
    if num_blocks * block_size < max_model_len:
        raise ConfigError(
            f"the KV cache has room for {num_blocks * block_size} tokens ({num_blocks} blocks of {block_size}), "
            f"{max_model_len - num_blocks * block_size} fewer than one request of --max-model-len {max_model_len}: "
            "lower --max-model-len, or raise --device-memory or --kv-cache-memory-bytes"
        )
