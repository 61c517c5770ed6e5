"""The random noise with which tokens are drawn. Seeds are fixed; thresholds are at least five standard deviations."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.kernels.gumbel_noise import gumbel
from shoal.worker.random import U64, row_keys, split_keys

EULER = 0.5772156649015329


def u64(*values: int) -> U64:
    return np.array(values, np.uint64)


def keys_of(count: int, seed: int = 1, *, step: str = "position") -> Tensor:
    """Return the keys of rows that differ only in the part named `step`."""
    parts = {"seed": u64(seed), "sample": u64(0), "position": u64(0)}
    parts[step] = (parts[step] + np.arange(count, dtype=np.uint64)).astype(np.uint64)
    seeds, samples, positions = np.broadcast_arrays(*parts.values())
    return split_keys(row_keys(seeds.copy(), samples.copy(), positions.copy()))


def ids_to(count: int) -> Tensor:
    return torch.arange(count, dtype=torch.int32)


def standardized(noise: Tensor) -> Tensor:
    return (noise.double() - EULER) / (math.pi / math.sqrt(6))


def test_moments_are_those_of_the_gumbel_distribution() -> None:
    """For a million draws, the deviation of the mean is 0.0013, of the variance 0.0035, of the third moment 0.03."""
    noise = standardized(gumbel(keys_of(1000), ids_to(1000)))
    assert abs(noise.mean().item()) < 0.007
    assert abs(noise.var().item() - 1) < 0.02
    assert abs((noise**3).mean().item() - 1.1395) < 0.1


@pytest.mark.parametrize("step", ["seed", "sample", "position"])
def test_the_distribution_is_gumbel(step: str) -> None:
    """Kolmogorov-Smirnov test: with right noise, the distance exceeds 2.2 / sqrt(n) once in 10,000 runs."""
    noise = gumbel(keys_of(300, step=step), ids_to(300)).double().flatten().sort().values
    expected = torch.exp(-torch.exp(-noise))
    found = torch.arange(1, len(noise) + 1, dtype=torch.float64) / len(noise)
    assert (found - expected).abs().max().item() < 2.2 / math.sqrt(len(noise))


@pytest.mark.parametrize("step", ["seed", "sample", "position"])
@pytest.mark.parametrize("lag", [1, 2, 64])
def test_neighbours_are_independent(step: str, lag: int) -> None:
    """The neighbours differ in the id or in a part of the key. With 250,000 pairs, a correlation deviates by 0.002."""
    noise = standardized(gumbel(keys_of(500, step=step), ids_to(500)))
    rows = (noise[lag:] * noise[:-lag]).mean().item()
    ids = (noise[:, lag:] * noise[:, :-lag]).mean().item()
    both = (noise[lag:, lag:] * noise[:-lag, :-lag]).mean().item()
    assert max(abs(rows), abs(ids), abs(both)) < 0.012


def test_every_id_wins_equally_often() -> None:
    """Chi-square of 16 cells has mean 15 and deviation 5.5; with right noise, it exceeds 45 once in 10,000 runs."""
    winners = gumbel(keys_of(20_000), ids_to(16)).argmax(1)
    counts = torch.bincount(winners, minlength=16).double()
    assert ((counts - 1250) ** 2 / 1250).sum().item() < 45


def test_noise_is_finite_at_the_ends_of_the_range() -> None:
    """Some of the three million draws are within 2**-20 of either end."""
    noise = gumbel(keys_of(20), torch.arange(-75_000, 75_000, dtype=torch.int32))
    assert bool(noise.isfinite().all())
    assert noise.max().item() > 13
    assert noise.min().item() < -2.4


def test_noise_depends_only_on_key_and_id() -> None:
    keys, ids = keys_of(7), ids_to(40)
    whole = gumbel(keys, ids)
    assert torch.equal(gumbel(keys[3:5], ids[11:20]), whole[3:5, 11:20])
    per_row = torch.stack([ids.roll(row) for row in range(7)])
    assert torch.equal(gumbel(keys, per_row), whole.gather(1, per_row.long()))


def test_keys_differ_if_any_of_their_parts_differs() -> None:
    some = [0, 1, 2, 2**31, 2**32, 2**63, 2**64 - 1]
    grid = np.array([(a, b, c) for a in some for b in some for c in some], np.uint64)
    keys = row_keys(grid[:, 0], grid[:, 1], grid[:, 2])
    assert len(set(keys.tolist())) == len(some) ** 3
    assert keys[5] == row_keys(grid[5:6, 0], grid[5:6, 1], grid[5:6, 2])[0]


def test_the_keys_never_change() -> None:
    """Users repeat published results by their seed, so the keys must never change."""
    mask, state = 2**64 - 1, 0

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for part in (2**64 - 1, 3, 77):
        state = mix(state ^ part)
    assert row_keys(u64(2**64 - 1), u64(3), u64(77)).tolist() == [state]
    low, high = split_keys(u64(state)).tolist()[0]
    assert (high % 2**32) << 32 | low % 2**32 == state


def test_the_noise_never_changes() -> None:
    mask = 2**32 - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & mask
        x = ((x ^ (x >> 15)) * 0x846CA68B) & mask
        return x ^ (x >> 16)

    keys = torch.tensor([[-5, 12345]], dtype=torch.int32)
    for token in (0, 1, 31_999, 262_143):
        bits = mix(mix(token ^ (-5 % 2**32)) ^ 12345) & 0x7FFFFFFF
        uniform = 1 - (bits + 0.5) / 2**31
        found = gumbel(keys, torch.tensor([token], dtype=torch.int32)).item()
        assert found == pytest.approx(-math.log(-math.log(uniform)), abs=1e-5)
