"""Which type each part of a step is computed in. One table, read by whoever needs it.

| config dtype | weights, activations | residual, KV cache, reductions | norms, softmax, sums | logits, sampling |
|---|---|---|---|---|
| float32 | float32 | float32 | float32 | float32 |
| bfloat16 | bfloat16 | bfloat16 | float32 | float32 |
| float16 | float16 | float16 | float32 | float32 |

Norm weights have the weights' type, but those of `rms_wide` (kernels.base.Norm) are float32 everywhere.

It is the same on CPU and CUDA, and follows what `transformers` computes, so that tokens can be compared.
"""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Precision:
    weights: torch.dtype
    activations: torch.dtype
    kv: torch.dtype
    logits: torch.dtype = torch.float32


PRECISION = {
    name: Precision(dtype, dtype, dtype)
    for name, dtype in {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.items()
}
