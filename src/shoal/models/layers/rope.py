"""Rotary position embedding (Su et al., 2021): the tables of angles, with the kinds of scaling for longer texts."""

import math

import torch
from torch import Tensor

from shoal.kernels.base import Rope
from shoal.models.spec import RopeSpec


def rope_tables(spec: RopeSpec, head_dim: int, max_positions: int, device: torch.device) -> Rope:
    """Return the tables of cos and sin, float32 [max_positions, rotary_dim / 2]."""
    frequencies = _frequencies(spec, spec.rotary_dim or head_dim)
    angles = torch.outer(torch.arange(max_positions, dtype=torch.float32), frequencies)
    factor = spec.attention_factor
    return Rope((angles.cos() * factor).to(device), (angles.sin() * factor).to(device))


def _frequencies(spec: RopeSpec, dim: int) -> Tensor:
    """Return the angle per position of each pair of dimensions, float32 [dim / 2]."""
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
    """Return frequencies with YaRN scaling (Peng et al., 2023).

    Pairs of dimensions that make fewer than `beta_slow` turns within the original length are scaled, those that make
    more than `beta_fast` turns are kept, and the pairs between are blended linearly.
    """

    def pair_with_turns(turns: float) -> float:
        """Return the index of the pair that makes `turns` turns within the original length; it may be fractional."""
        wavelength = spec.original_max_positions / (turns * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(spec.theta))

    first, last = pair_with_turns(spec.beta_fast), pair_with_turns(spec.beta_slow)
    if spec.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, dim - 1)
    pairs = torch.arange(len(frequencies), dtype=torch.float32)
    stretched = ((pairs - first) / max(last - first, 1e-3)).clamp(0, 1)
    return frequencies / spec.factor * stretched + frequencies * (1 - stretched)


def _llama3(frequencies: Tensor, spec: RopeSpec) -> Tensor:
    """Return frequencies with the scaling of Llama 3.1: low ones are divided by `factor`, those between are blended."""
    wavelengths = 2 * math.pi / frequencies
    longest = spec.original_max_positions / spec.low_freq_factor
    shortest = spec.original_max_positions / spec.high_freq_factor
    blend = (spec.original_max_positions / wavelengths - spec.low_freq_factor) / (
        spec.high_freq_factor - spec.low_freq_factor
    )
    blended = (1 - blend) * frequencies / spec.factor + blend * frequencies
    stretched = torch.where(wavelengths > longest, frequencies / spec.factor, frequencies)
    return torch.where((wavelengths <= longest) & (wavelengths >= shortest), blended, stretched)
