"""Rotary position embedding: the tables of angles (Su et al., 2021), and how families stretch them."""

import math

import torch
from torch import Tensor

from shoal.kernels.base import Rope
from shoal.models.spec import RopeSpec


def rope_tables(spec: RopeSpec, head_dim: int, max_positions: int, device: torch.device) -> Rope:
    """cos and sin: [max_positions, rotary_dim / 2], float32."""
    frequencies = _frequencies(spec, spec.rotary_dim or head_dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    factor = spec.attention_factor
    return Rope((angles.cos() * factor).to(device), (angles.sin() * factor).to(device))


def _frequencies(spec: RopeSpec, dim: int) -> Tensor:
    frequencies = 1.0 / spec.theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if spec.kind == "linear":
        return frequencies / spec.factor
    if spec.kind == "llama3":
        return _llama3(frequencies, spec)
    if spec.kind == "yarn":
        return _yarn(frequencies, spec, dim)
    if spec.kind == "longrope":  # LongRoPE (Ding et al., 2024), within the original context
        return frequencies / torch.tensor(spec.short_factors, dtype=torch.float32)
    return frequencies


def _yarn(frequencies: Tensor, spec: RopeSpec, dim: int) -> Tensor:
    """YaRN (Peng et al., 2023): what turns less than `beta_slow` times within the original context is stretched, what
    turns more than `beta_fast` times is kept, and between the two is a ramp over the dimensions."""

    def dimension(turns: float) -> float:
        """The pair that turns so often, counted in pairs and fractions of them."""
        wavelength = spec.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(spec.theta))

    first, last = dimension(spec.beta_fast), dimension(spec.beta_slow)
    if spec.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    pairs = torch.arange(len(frequencies), dtype=torch.float32)
    stretched = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies / spec.factor * stretched + frequencies * (1 - stretched)


def _llama3(frequencies: Tensor, spec: RopeSpec) -> Tensor:
    """Llama 3.1: long waves are stretched by `factor`, short ones kept, those between blended."""
    wavelengths = 2 * math.pi / frequencies
    longest = spec.original_max_positions / spec.low_freq_factor
    shortest = spec.original_max_positions / spec.high_freq_factor
    blend = (spec.original_max_positions / wavelengths - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    blended = (1 - blend) * frequencies / spec.factor + blend * frequencies
    stretched = torch.where(wavelengths > longest, frequencies / spec.factor, frequencies)
    return torch.where((wavelengths <= longest) & (wavelengths >= shortest), blended, stretched)
