"""transformers' models with quantized linear layers as ranks compute them, from dequantized codes and in float64."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.kernels.linear_weights import quantize_rows
from shoal.kernels.quantized import quantize_weight
from shoal.kernels.weight_format import QUANTIZATIONS, WeightFormat
from support.checkpoints import Reference


class QuantizedModule(nn.Module):
    """A linear layer whose inputs are divided over ranks: each rank has scales of its own for its weight and rows.

    A rank whose part is too small for the format computes with the plain numbers.
    """

    def __init__(self, plain: nn.Linear, spans: Sequence[range], kept_in: WeightFormat) -> None:
        super().__init__()
        self.bias = plain.bias
        self.kept_in = kept_in
        self.spans = [slice(span.start, span.stop) for span in spans]
        parts = [plain.weight[:, span] for span in self.spans]
        self.small = [not kept_in.takes(part.shape) for part in parts]
        self.weights = [
            (part if small else quantize_weight(part.detach(), kept_in).dequantized()).double()
            for part, small in zip(parts, self.small, strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = torch.zeros((), dtype=torch.float64)
        for span, weight, small in zip(self.spans, self.weights, self.small, strict=True):
            part = rows[:, span]
            out = out + F.linear(part.double() if small else self.rounded(part), weight)
        out = out.float() if self.bias is None else out.float() + self.bias
        shaped: Tensor = out.unflatten(0, x.shape[:-1])
        return shaped

    def rounded(self, rows: Tensor) -> Tensor:
        """Return what the codes of rows stand for: they have a scale for each group of inputs of the weight."""
        parts = [quantize_rows(part) for part in rows.split(self.kept_in.group or rows.shape[1], dim=1)]
        return torch.cat([codes.double() * scales for codes, scales in parts], dim=1)


class QuantizedReference(Reference):
    """transformers' greedy continuation with quantized linear layers.

    Args:
        cuts: for layers whose inputs are divided over ranks the inputs of each rank, by the last part of their path.
        quantization: a value of `--quantization`.
    """

    def __init__(self, folder: Path, cuts: Mapping[str, Sequence[range]], quantization: str) -> None:
        super().__init__(folder)
        formats = QUANTIZATIONS[quantization]
        self.model = copy.deepcopy(self.model)  # others share it
        for path, layer in list(self.model.named_modules()):
            if type(layer) is nn.Linear:
                parent, _, name = path.rpartition(".")
                spans = cuts.get(name, [range(layer.in_features)])
                kept_in = formats.head if name == "lm_head" else formats.layers
                setattr(self.model.get_submodule(parent), name, QuantizedModule(layer, spans, kept_in))
