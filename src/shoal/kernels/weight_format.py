"""The formats in which a rank keeps the weight of a linear layer in fewer bits. Free of torch."""

from dataclasses import dataclass

_FLOAT = 4  # bytes of a float32
# Larger sums of products of two codes do not fit into an int32.
_MOST_INPUTS = 1 << 17
# A matrix with fewer inputs would hardly be smaller: each of its outputs has up to 8 bytes beside the codes.
_FEWEST_INPUTS = 16
_OUTPUTS_OF_BLOCK, _ROW_ALIGNMENT, _STEP_BYTES = 16, 64, 4  # as in csrc/integer_rows.h


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A way to keep the weight of a linear layer, [outputs, inputs]: as small integers, the codes, with scales."""

    name: str
    bits: int  # of a code
    group: int | None = None  # neighbouring inputs of an output that share a scale; None: all that the rank has
    beside: int = 2 * _FLOAT  # bytes that a packed weight has beside the codes of a group: for its scale and its zero

    @property
    def unit(self) -> int:
        """The number of neighbouring inputs that a cut over ranks must not separate, if files have the codes."""
        return self.group or 1

    def groups(self, inputs: int) -> int:
        """Return the number of groups of an output. The last one may be smaller."""
        return 1 if self.group is None else -(-inputs // self.group)

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a weight of this shape can be kept in this format, and is smaller for it."""
        if len(shape) != 2 or shape[0] == 0 or shape[1] < _FEWEST_INPUTS:
            return False
        return self.group is not None or shape[1] <= _MOST_INPUTS

    def weight_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a weight as it is packed: its codes, and what its groups have beside them."""
        outputs, inputs = shape
        return padded_outputs(outputs) * (self._code_bytes(inputs) + self.groups(inputs) * self.beside)

    def row_bytes(self, inputs: int) -> int:
        """Return the bytes of a row of activations that was quantized: its codes, and what its groups have beside them.

        Without groups that is a scale, and codes may have two bytes, as AVX2 takes them. With groups each of them has
        its full size, a scale and a sum of codes.
        """
        if self.group is None:
            return 2 * _multiple(inputs, _ROW_ALIGNMENT) + _FLOAT
        return self.groups(inputs) * (self.group + 2 * _FLOAT)

    def packed_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of the codes of a packed weight."""
        return padded_outputs(shape[0]) * self._code_bytes(shape[1])

    def _code_bytes(self, inputs: int) -> int:
        """Return the bytes of the codes of a packed output: whole steps of inputs, with 4 bytes for each step."""
        return _multiple(inputs, _STEP_BYTES * 8 // self.bits) * self.bits // 8


@dataclass(frozen=True, slots=True)
class Quantization:
    """The formats of linear layers and of the output head for a value of `--quantization`."""

    layers: WeightFormat
    head: WeightFormat


INT8 = WeightFormat("int8", bits=8)
INT4 = {group: WeightFormat(f"int4, groups of {group}", bits=4, group=group, beside=_FLOAT) for group in (32, 64, 128)}

# The head is a small part of a large model, and in 4 bits it would add as much error as all layers together.
QUANTIZATIONS = {
    "int8": Quantization(INT8, INT8),
    "int4": Quantization(INT4[128], INT8),
    **{f"int4-g{group}": Quantization(kept_in, INT8) for group, kept_in in INT4.items()},
}


def padded_outputs(outputs: int) -> int:
    """Return the number of outputs that a packed weight has."""
    return _multiple(outputs, _OUTPUTS_OF_BLOCK)


def _multiple(number: int, unit: int) -> int:
    return -(-number // unit) * unit
