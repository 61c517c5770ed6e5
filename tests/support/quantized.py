"""Checkpoints in FP8 with a scale for each block, like DeepSeek's, and the same numbers in float32."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

LARGEST = 448.0  # of float8_e4m3


def quantize(whole: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return a tensor [.., rows, columns] as FP8 numbers, a float32 scale for each block, and their float32 values."""
    *before, height, width = whole.shape
    down, across = -(-height // block[0]), -(-width // block[1])
    padded = whole.new_zeros((*before, down * block[0], across * block[1]))
    padded[..., :height, :width] = whole
    blocks = padded.unflatten(-1, (across, block[1])).unflatten(-3, (down, block[0]))
    scales = blocks.abs().amax((-3, -1)).clamp(min=1e-6) / LARGEST
    wide = scales.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)[..., :height, :width]
    numbers = (whole / wide).to(torch.float8_e4m3fn)
    return numbers, scales, numbers.float() * wide


def write_quantized(source: Path, folder: Path, block: tuple[int, int]) -> tuple[Path, Path]:
    """Write a checkpoint with the layers' matrices in FP8, and another with the same numbers in float32."""
    config = json.loads((source / "config.json").read_text())
    quantization = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(block)}
    quantized, widened = folder / "quantized", folder / "widened"
    small: dict[str, Tensor] = {}
    wide: dict[str, Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        small[name] = wide[name] = tensor
        if tensor.ndim > 1 and ("layers." in name or ".h." in name) and not name.endswith("gate.weight"):
            small[name], small[f"{name}_scale_inv"], wide[name] = quantize(tensor, block)
    for target, tensors, more in ((quantized, small, {"quantization_config": quantization}), (widened, wide, {})):
        target.mkdir()
        (target / "config.json").write_text(json.dumps(config | more))
        save_file(tensors, target / "model.safetensors")
    return quantized, widened
