"""The formats in which a rank keeps the weight of a linear layer in fewer bits. Free of torch."""

from dataclasses import dataclass

_FLOAT = 4  # bytes of a float32
# Larger sums of products of two codes do not fit into an int32.
_MOST_INPUTS = 1 << 17
# A matrix with fewer inputs would hardly be smaller: each of its outputs has 8 bytes beside the codes.
_FEWEST_INPUTS = 16
_OUTPUTS_OF_BLOCK, _INPUTS_OF_STEP, _ROW_ALIGNMENT = 16, 4, 64  # as in csrc/int8_linear.cpp


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """A way to keep the weight of a linear layer, [outputs, inputs]: as small integers, the codes, with scales."""

    name: str
    bits: int  # of a code
    group: int | None = None  # neighbouring inputs of an output that share a scale; None: all that the rank has

    @property
    def unit(self) -> int:
        """The number of neighbouring inputs that a cut over ranks must not separate."""
        return self.group or 1

    def takes(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a weight of this shape can be kept in this format, and is smaller for it."""
        return len(shape) == 2 and shape[0] > 0 and _FEWEST_INPUTS <= shape[1] <= _MOST_INPUTS

    def weight_bytes(self, shape: tuple[int, ...]) -> int:
        """Return the bytes of a weight as it is packed: its codes, and for each output a scale and an offset."""
        outputs, inputs = padded_outputs(shape[0]), _multiple(shape[1], _INPUTS_OF_STEP)
        return outputs * inputs * self.bits // 8 + 2 * _FLOAT * outputs

    def row_bytes(self, inputs: int) -> int:
        """Return the bytes of a row of activations that was quantized: its codes and its scale."""
        return padded_inputs(inputs) + _FLOAT


INT8 = WeightFormat("int8", bits=8)
FORMATS = {each.name: each for each in (INT8,)}


def padded_outputs(outputs: int) -> int:
    """Return the number of outputs that a packed weight has."""
    return _multiple(outputs, _OUTPUTS_OF_BLOCK)


def padded_inputs(inputs: int) -> int:
    """Return the number of codes that a quantized row of activations has."""
    return _multiple(inputs, _ROW_ALIGNMENT)


def packed_size(outputs: int, inputs: int) -> int:
    """Return the number of codes of a packed weight."""
    return padded_outputs(outputs) * _multiple(inputs, _INPUTS_OF_STEP)


def _multiple(number: int, unit: int) -> int:
    return -(-number // unit) * unit
