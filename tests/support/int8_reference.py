"""transformers' models with int8 linear layers as ranks compute them, from dequantized codes and in float64."""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.kernels.linear_weights import quantize_rows, quantize_weight
from shoal.kernels.weight_format import INT8
from support.checkpoints import Reference


class Int8Module(nn.Module):
    """A linear layer whose inputs are divided over ranks: each rank has scales of its own for its weight and rows.

    A rank whose part is too small for int8 computes with the plain numbers.
    """

    def __init__(self, plain: nn.Linear, spans: Sequence[range]) -> None:
        super().__init__()
        self.bias = plain.bias
        self.spans = [slice(span.start, span.stop) for span in spans]
        parts = [plain.weight[:, span] for span in self.spans]
        self.small = [not INT8.takes(part.shape) for part in parts]
        self.weights = [
            (part if small else quantize_weight(part).dequantized()).double()
            for part, small in zip(parts, self.small, strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        out = torch.zeros((), dtype=torch.float64)
        for span, weight, small in zip(self.spans, self.weights, self.small, strict=True):
            codes, scales = quantize_rows(rows[:, span])
            out = out + F.linear(rows[:, span].double() if small else codes.double() * scales, weight)
        out = out.float() if self.bias is None else out.float() + self.bias
        shaped: Tensor = out.unflatten(0, x.shape[:-1])
        return shaped


class Int8Reference(Reference):
    """transformers' greedy continuation with int8 linear layers.

    Args:
        cuts: for layers whose inputs are divided over ranks the inputs of each rank, by the last part of their path.
    """

    def __init__(self, folder: Path, cuts: Mapping[str, Sequence[range]]) -> None:
        super().__init__(folder)
        self.model = copy.deepcopy(self.model)  # others share it
        for path, layer in list(self.model.named_modules()):
            if type(layer) is nn.Linear:
                parent, _, name = path.rpartition(".")
                spans = cuts.get(name, [range(layer.in_features)])
                setattr(self.model.get_submodule(parent), name, Int8Module(layer, spans))
