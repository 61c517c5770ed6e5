"""Planning of `--quantization`: whether the devices can compute with it, and which weights it changes."""

from collections import Counter
from collections.abc import Iterable, Sequence

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.models.manifest import Cut, Param, Shard


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
    line = f"quantization {wanted}: {_count_by_format(param for _, param in parts if param.name not in left)}"
    cut = {param.name for shard, param in parts if _cut_within_group(shard, param)} - left.keys()
    if cut:
        line += f"; {len(cut)} of them are cut within groups, so each rank makes groups of its own there"
    if not left:
        return line
    name, shape = next(iter(left.items()))
    others = f", and {len(left) - 1} others" if len(left) > 1 else ""
    return f"{line}; {name} of shape {list(shape)}{others} are too small or too wide, and stay in {dtype}"


def _count_by_format(params: Iterable[Param]) -> str:
    formats = {param.name: param.format.name for param in params if param.format is not None}
    counts = Counter(formats.values())
    if len(counts) < 2:
        return f"{len(formats)} matrices"
    return "matrices in " + "; in ".join(f"{name}: {count}" for name, count in counts.items())


def _cut_within_group(shard: Shard, param: Param) -> bool:
    """Tell whether a rank's inputs begin within a group of the whole matrix."""
    group = param.format.group if param.format is not None else None
    starts = [shard.ranges[piece.cut].start for piece in param.pieces if piece.dim == 1 and piece.cut is not Cut.WHOLE]
    return group is not None and any(start % group for start in starts)
