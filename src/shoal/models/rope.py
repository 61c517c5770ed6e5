"""Rotary position embedding: the tables of angles (Su et al., 2021), and how families stretch them."""

import math

import torch
from torch import Tensor

from shoal.kernels.base import Rope
from shoal.models.spec import RopeSpec


def rope_tables(spec: RopeSpec, head_dim: int, max_positions: int, device: torch.device) -> Rope:
    """cos and sin: [max_positions, head_dim / 2], float32."""
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), _frequencies(spec, head_dim))
    return Rope(angles.cos().to(device), angles.sin().to(device))


def _frequencies(spec: RopeSpec, head_dim: int) -> Tensor:
    frequencies = 1.0 / spec.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if spec.kind == "linear":
        return frequencies / spec.factor
    if spec.kind == "llama3":
        return _llama3(frequencies, spec)
    return frequencies


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
