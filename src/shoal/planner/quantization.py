"""Planning of `--quantization`: whether the devices can compute with it, and which weights it changes."""

from collections.abc import Sequence

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.models.manifest import Param, Shard


def check_quantization(options: EngineOptions, device: str) -> None:
    """Check that the devices of the ranks can compute with quantized weights.

    Raises:
        ConfigError: they can't.
    """
    wanted = options.model_options.quantization
    if wanted and device != "cpu":
        raise ConfigError(
            f"--quantization {wanted} is for CPUs, but the device is {device}: leave it out, or use --device cpu"
        )


def describe_quantization(wanted: str, params: Sequence[Param], shards: Sequence[Shard], dtype: str) -> str:
    """Return a line for the log: how many matrices are quantized, and which are not although they might be."""
    parts = [(shard, param) for shard in shards for param in shard.held(params) if param.format is not None]
    left = {param.name: shard.param_shape(param) for shard, param in parts if shard.format_of(param) is None}
    left = {name: shape for name, shape in left.items() if 0 not in shape}  # a rank may have no part of a matrix
    line = f"quantization {wanted}: {len({param.name for _, param in parts} - left.keys())} matrices"
    if not left:
        return line
    name, shape = next(iter(left.items()))
    others = f", and {len(left) - 1} others" if len(left) > 1 else ""
    return f"{line}; {name} of shape {list(shape)}{others} are too small or too wide, and stay in {dtype}"
