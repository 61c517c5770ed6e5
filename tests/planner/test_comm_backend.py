import pytest

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError
from shoal.planner.comm_backend import check_comm_backend


def check(backend: str, device: str = "cpu", executor: str = "mp", hosts: int = 1) -> list[str]:
    options = EngineOptions.from_flat(None, {"comm_backend": backend})
    warnings: list[str] = []
    check_comm_backend(options, device, executor, hosts, warnings)
    return warnings


@pytest.mark.parametrize(
    ("backend", "device", "hosts", "expected"),
    [
        ("nccl", "cpu", 1, "--comm-backend nccl needs GPUs, but the device is cpu: use shm, gloo or auto"),
        ("shm", "cuda", 1, "--comm-backend shm is for CPUs, but the device is cuda: use nccl or auto"),
        ("gloo", "cuda", 1, "--comm-backend gloo is for CPUs, but the device is cuda"),
        ("shm", "cpu", 2, "--comm-backend shm is for one host, but the replica has ranks on 2: use gloo, or auto"),
    ],
)
def test_a_backend_that_cannot_serve_is_refused(backend: str, device: str, hosts: int, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(backend, device, hosts=hosts)
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    ("backend", "device", "hosts"),
    [("auto", "cpu", 2), ("shm", "cpu", 1), ("gloo", "cpu", 2), ("nccl", "cuda", 2), ("auto", "cuda", 1)],
)
def test_other_backends_are_taken(backend: str, device: str, hosts: int) -> None:
    assert check(backend, device, hosts=hosts) == []


@pytest.mark.parametrize("executor", ["uni", "threads"])
def test_ranks_of_one_process_need_none(executor: str) -> None:
    assert check("auto", executor=executor) == []
    assert check("shm", executor=executor) == [
        f"--comm-backend shm changes nothing: the ranks are in one process (executor {executor})"
    ]
