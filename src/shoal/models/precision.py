"""The type in which each part of a step is computed, as one table for all code.

| config dtype | weights, activations | residual, reductions, KV cache | norms, softmax, sums | logits, sampling |
|---|---|---|---|---|
| float32 | float32 | float32 | float32 | float32 |
| bfloat16 | bfloat16 | bfloat16 | float32 | float32 |
| float16 | float16 | float16 | float32 | float32 |

With `--quantization` the weights of linear layers are int8 or 4-bit integers with float32 scales, and a linear layer
rounds each row of its activations to int8. Sums are int32 (with 4 bits: those of a group of inputs), and products with
scales and sums of groups are float32. All other types stay.

With `--kv-cache-dtype` keys and values are kept in another type (`models.kv_format`), and read as they are kept.

Norms have weights of the same type as all others, but those of `rms_wide` (kernels.base.Norm) are always float32.

The table is the same for CPU and CUDA. It follows transformers, so that tokens can be compared.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Precision:
    """The types of one row of the table."""

    weights: torch.dtype
    activations: torch.dtype
    logits: torch.dtype = torch.float32


PRECISION = {
    name: Precision(dtype, dtype)
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.items()
}
