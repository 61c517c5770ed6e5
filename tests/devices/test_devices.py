"""What a host has, read from the files and listings that it would show."""

from pathlib import Path

import pytest

from shoal.devices import cpu, cuda
from shoal.errors import ConfigError

LISTING = "0, GPU-aaaa, 81559\n1, GPU-bbbb, 24576\n"
MIB = 2**20


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, [("0", 81559), ("1", 24576)]),
        ("1", [("1", 24576)]),
        ("1,0", [("1", 24576), ("0", 81559)]),
        (" 1 , GPU-aa", [("1", 24576), ("GPU-aa", 81559)]),
        ("GPU-bb", [("GPU-bb", 24576)]),
        ("", []),
        ("-1", []),
        ("0,-1,1", [("0", 81559)]),
        ("0,7,1", [("0", 81559)]),
        ("GPU-cc,0", []),
        ("GPU-", []),  # two begin so
        ("0,1,0", []),
        ("0,GPU-aaaa", []),
        ("MIG-1234-56,MIG-78", [("MIG-1234-56", None)]),
        ("MIG-GPU-aaaa/1/0", [("MIG-GPU-aaaa/1/0", None)]),
    ],
)
def test_visible_gpus_are_counted_from_zero(variable: str | None, expected: list[tuple[str, int | None]]) -> None:
    found = cuda.visible_gpus(LISTING, variable)
    assert [(gpu.name, gpu.memory and gpu.memory // MIB) for gpu in found] == expected


@pytest.mark.parametrize("variable", [None, "0", "MIG-1234"])
def test_a_host_without_gpus(variable: str | None) -> None:
    assert cuda.visible_gpus("", variable) == []


def test_a_gpu_cannot_pose_as_two(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_ask", lambda: LISTING)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = cuda.discover()
    assert found is not None
    assert (found.num_devices, found.device_memory, found.devices_shareable) == (2, 24576 * MIB, False)
    assert found.visible == ()
    with pytest.raises(ConfigError, match="this host shows 2 GPUs; or"):
        cuda.discover(3)


def test_the_variable_says_which(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_ask", lambda: LISTING)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-bb,0")
    found = cuda.discover()
    assert found is not None
    assert found.visible == ("GPU-bb", "0")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(ConfigError, match="shows 1 GPUs under CUDA_VISIBLE_DEVICES='0'"):
        cuda.discover(2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234,MIG-5678")
    found = cuda.discover()
    assert found is not None
    assert (found.num_devices, found.device_memory, found.visible) == (1, None, ("MIG-1234",))
    for none in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", none)
        assert cuda.discover() is None


def test_control_groups_of_both_versions(tmp_path: Path) -> None:
    nested = cpu.control_groups("0::/a/b\n", tmp_path)
    assert nested == [tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    old = cpu.control_groups("5:cpu,cpuacct:/x\n4:memory:/x\n", tmp_path)
    assert old == [tmp_path / "memory" / "x", tmp_path / "memory"]


@pytest.mark.parametrize("version", [1, 2])
def test_a_groups_limit_less_what_it_cannot_give_back(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    membership, folder = ("4:memory:/job\n", "memory/job") if version == 1 else ("0::/job\n", "job")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    group = tmp_path / folder
    group.mkdir(parents=True)
    (group / names[0]).write_text(f"{64 * MIB}\n")
    (group / names[1]).write_text(f"{50 * MIB}\n")
    prefix = "total_" if version == 1 else ""
    (group / "memory.stat").write_text(f"anon 1\n{prefix}inactive_file {30 * MIB}\n{prefix}active_file {10 * MIB}\n")
    original = cpu.control_groups
    monkeypatch.setattr(cpu, "control_groups", lambda _membership, _root: original(membership, tmp_path))
    assert cpu.memory() == (64 * MIB, 54 * MIB)


def test_ranks_share_out_the_cores() -> None:
    shares = [cpu.cores_of_rank((2, 3, 5, 7, 8), rank, 2) for rank in range(2)]
    assert shares == [(2, 3, 5), (7, 8)]
    assert [cpu.cores_of_rank((2, 3), rank, 3) for rank in range(3)] == [(2,), (3,), (2,)]
