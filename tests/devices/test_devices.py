"""Tests of the hardware of a host, as files of the kernel and listings of nvidia-smi describe it."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest

from shoal.devices import cpu, cuda
from shoal.errors import ConfigError
from support.gpus import pose_as_host_with

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
        ("GPU-", []),  # the prefix of two UUIDs
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


@pytest.mark.slow
def test_a_gpu_cannot_pose_as_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as_host_with(LISTING, tmp_path, monkeypatch)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = cuda.discover()
    assert found is not None
    assert (found.num_devices, found.device_memory, found.devices_shareable) == (2, 24576 * MIB, False)
    assert found.visible == ()
    with pytest.raises(ConfigError, match="this host shows 2 GPUs; or"):
        cuda.discover(3)


@pytest.mark.slow
def test_the_variable_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pose_as_host_with(LISTING, tmp_path, monkeypatch)
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
    nested = cpu.control_groups("0::/a/b\n", tmp_path, "memory")
    assert nested == [tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    old = cpu.control_groups("5:cpu,cpuacct:/x\n4:memory:/x\n", tmp_path, "memory")
    assert old == [tmp_path / "memory" / "x", tmp_path / "memory"]
    both = cpu.control_groups("5:cpu,cpuacct:/x\n4:memory:/x\n", tmp_path, "cpu")
    assert both == [tmp_path / name / inner for name in ("cpu", "cpu,cpuacct") for inner in ("x", "")]


@pytest.mark.parametrize("version", [1, 2])
def test_available_memory_is_the_groups_limit_minus_unreclaimable_memory(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    membership, folder = ("4:memory:/job\n", "memory/job") if version == 1 else ("0::/job\n", "job")
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    prefix = "total_" if version == 1 else ""
    files = {
        names[0]: f"{64 * MIB}\n",
        names[1]: f"{50 * MIB}\n",
        "memory.stat": f"anon 1\n{prefix}inactive_file {30 * MIB}\n{prefix}active_file {10 * MIB}\n",
    }
    root = host(tmp_path, membership, {f"{folder}/{name}": text for name, text in files.items()})
    assert cpu.memory(root) == (64 * MIB, 54 * MIB)


def host(root: Path, membership: str, groups: Mapping[str, str], *, meminfo: bool = True) -> Path:
    """Write files as the kernel would show them, and return their root."""
    files = {"proc/self/cgroup": membership} | {f"sys/fs/cgroup/{name}": text for name, text in groups.items()}
    if meminfo:
        files["proc/meminfo"] = f"MemTotal: {2**20} kB\nMemAvailable: {2**19} kB\n"
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


V1 = "5:cpu,cpuacct:/pod/job\n4:memory:/pod/job\n0::/\n"
V2 = "0::/pod/job\n"


@pytest.mark.parametrize(
    ("membership", "groups", "quota"),
    [
        (V2, {"pod/job/cpu.max": "150000 100000\n"}, 1.5),
        (V2, {"pod/job/cpu.max": "max 100000\n"}, None),
        (V2, {"pod/job/cpu.max": "max 100000\n", "pod/cpu.max": "50000 100000\n"}, 0.5),
        (V2, {"pod/job/cpu.max": "300000 100000\n", "pod/cpu.max": "400000 200000\n"}, 2.0),
        ("0::/\n", {"cpu.max": "100000 100000\n"}, 1.0),  # in a container with a hierarchy of its own
        ("0::/../other\n", {"cpu.max": "100000 100000\n"}, 1.0),
        (V2, {}, None),
        (V2, {"pod/job/cpu.max": "nonsense\n"}, None),
        (V1, {"cpu/pod/job/cpu.cfs_quota_us": "-1\n", "cpu/pod/job/cpu.cfs_period_us": "100000\n"}, None),
        (V1, {"cpu/pod/job/cpu.cfs_quota_us": "250000\n", "cpu/pod/job/cpu.cfs_period_us": "100000\n"}, 2.5),
        (V1, {"cpu,cpuacct/pod/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/pod/cpu.cfs_period_us": "50000\n"}, 1.0),
        (V1, {"cpu/cpu.cfs_quota_us": "100000\n", "cpu/cpu.cfs_period_us": "50000\n"}, 2.0),
        ("", {}, None),
    ],
)
def test_the_tightest_cpu_quota_of_all_groups(
    tmp_path: Path, membership: str, groups: Mapping[str, str], quota: float | None
) -> None:
    assert cpu.cpu_quota(host(tmp_path, membership, groups)) == quota


@pytest.mark.parametrize(("quota", "count"), [("350000", 3), ("100000", 1), ("20000", 1), ("6400000", 6), ("max", 6)])
def test_a_quota_counts_like_affinity(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quota: str, count: int) -> None:
    """A quota is rounded down, to one core at least; all processes of a group choose the same cores."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 5, 7, 11, 13})
    root = host(tmp_path, V2, {"pod/job/cpu.max": f"{quota} 100000\n"})
    found = cpu.discover(root=root)
    assert len(found.cores) == found.num_devices == count
    assert set(found.cores) <= {2, 3, 5, 7, 11, 13}
    assert found == cpu.discover(root=root)
    told = (
        f"{count} of 6 CPU cores are used: the CPU quota of the control group is {int(quota) / 1e5:g}"
        if count < 6
        else ""
    )
    assert found.limits == ((told,) if told else ())
    assert cpu.discover(4, root).num_devices == 4


def test_containers_do_not_all_choose_the_first_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    chosen = set()
    for number in range(16):
        root = host(tmp_path / str(number), f"0::/pod{number}\n", {f"pod{number}/cpu.max": "100000 100000\n"})
        chosen |= set(cpu.discover(root=root).cores)
    assert len(chosen) > 8


def test_a_host_that_does_not_show_its_memory(tmp_path: Path) -> None:
    """This is the case under systemd's ProcSubset=pid. A control group's limit still applies."""
    root = host(tmp_path, V2, {"pod/job/memory.max": f"{64 * MIB}\n"}, meminfo=False)
    found = cpu.discover(root=root)
    assert found.host_memory == 64 * MIB >= found.host_memory_available > 0
    assert found.limits == (
        f"{root}/proc/meminfo does not exist: only free memory counts as available, not reclaimable memory",
    )


def test_a_host_that_does_not_say_how_much_memory_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sysconf", lambda _: -1)
    with pytest.raises(ConfigError, match=r"proc/meminfo can't be read.*ProcSubset=all"):
        cpu.discover(root=host(tmp_path, V2, {}, meminfo=False))
