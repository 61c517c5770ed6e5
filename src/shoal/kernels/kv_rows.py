"""Rows of the KV cache in PyTorch: written in the type of the cache, and read in the type of the activations."""

import torch
from torch import Tensor

KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
SCALE_DTYPE = torch.bfloat16

_LARGEST_CODE = 127


def store_rows(rows: Tensor, slots: Tensor, part: Tensor, scales: Tensor | None) -> None:
    """Write rows to slots of the keys or the values of a cache.

    rows: [n, kv_heads, head_dim]; slots: int64 [n]; part: [num_slots, kv_heads, head_dim]. scales:
    [num_slots, kv_heads], for int8 only. Numbers are rounded to nearest even. In types with a smaller range, those
    beyond it become the largest number, and NaN stays NaN.
    """
    if scales is not None:
        codes, own = _quantized(rows)
        part.index_copy_(0, slots, codes)
        scales.index_copy_(0, slots, own)
    elif part.dtype in (torch.float32, torch.bfloat16):
        part.index_copy_(0, slots, rows.to(part.dtype))
    else:
        largest = torch.finfo(part.dtype).max
        narrow = rows.float().clamp(-largest, largest).to(part.dtype)
        _as_plain(part).index_copy_(0, slots, _as_plain(narrow))


def read_rows(part: Tensor, scales: Tensor | None, slots: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the rows in these slots in `dtype`: [*slots.shape, kv_heads, head_dim]."""
    rows = _as_plain(part)[slots].view(part.dtype)
    if scales is None:
        return rows.to(dtype)
    return rows.float().mul_(scales[slots].float().unsqueeze(-1)).to(dtype)


def _quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the int8 codes of rows, and the scale of each.

    Rows with a NaN or an infinity have a scale that is none, and so become NaN altogether.
    """
    wide = rows.float()
    scales = (wide.abs().amax(-1) * (1 / _LARGEST_CODE)).to(SCALE_DTYPE)
    codes = (wide / scales.float().unsqueeze(-1)).clamp_(-_LARGEST_CODE, _LARGEST_CODE).round_().nan_to_num_(0)
    return codes.to(torch.int8), scales


def _as_plain(x: Tensor) -> Tensor:
    """Return FP8 numbers as bytes, since PyTorch cannot index them on every device."""
    return x.view(torch.uint8) if x.is_floating_point() and x.itemsize == 1 else x
