"""Reading how the weights are quantized from config.json. Free of torch.

Only FP8 weights (e4m3) with a scale for each block of a matrix are supported; they are widened when they are loaded.
"""

from shoal.errors import CheckpointError
from shoal.models.spec import Config, Unsupported

_HINT = "use the model from which it was quantized"


def weight_block(config: Config) -> tuple[int, int] | None:
    """Return the size of the blocks that share a scale, as (rows, columns), or None if no weight is quantized.

    Raises:
        Unsupported: the weights are quantized in another way.
        CheckpointError: `quantization_config` is malformed.
    """
    found = config.get("quantization_config")
    if not found:
        return None
    if not isinstance(found, dict):
        raise CheckpointError(f"config.json: quantization_config must be an object, got {found!r}")
    method = found.get("quant_method")
    if method != "fp8":
        raise Unsupported(f"config.json: weights quantized by {method!r} can't be loaded, only those by 'fp8': {_HINT}")
    if found.get("fmt", "e4m3") != "e4m3":
        raise Unsupported(f"config.json: fp8 weights of fmt {found['fmt']!r} can't be loaded, only e4m3: {_HINT}")
    block = found.get("weight_block_size")
    if block is None:
        raise Unsupported(f"config.json: fp8 weights without a weight_block_size can't be loaded: {_HINT}")
    if not isinstance(block, list) or len(block) != 2 or not all(type(size) is int and size > 0 for size in block):
        raise CheckpointError(f"config.json: weight_block_size must be two positive integers, got {block!r}")
    return block[0], block[1]
