"""The check that `--comm-backend` can serve a plan. Each group of ranks makes the choice when it connects."""

from shoal.config.engine_options import EngineOptions
from shoal.errors import ConfigError


def check_comm_backend(options: EngineOptions, device: str, executor: str, hosts: int, warnings: list[str]) -> None:
    """Refuse a backend that cannot serve the ranks of a replica, and warn of one that is not used.

    Args:
        device: of the ranks.
        executor: its name.
        hosts: how many hosts have ranks of the replica.

    Raises:
        ConfigError: the backend cannot serve this device, or several hosts.
    """
    wanted = options.parallel.comm_backend
    if wanted == "auto":
        return
    if executor in ("uni", "threads"):
        warnings.append(f"--comm-backend {wanted} changes nothing: the ranks are in one process (executor {executor})")
    elif wanted == "nccl" and device != "cuda":
        raise ConfigError(f"--comm-backend nccl needs GPUs, but the device is {device}: use shm, gloo or auto")
    elif wanted != "nccl" and device == "cuda":
        raise ConfigError(f"--comm-backend {wanted} is for CPUs, but the device is cuda: use nccl or auto")
    elif wanted == "shm" and hosts > 1:
        raise ConfigError(
            f"--comm-backend shm is for one host, but the replica has ranks on {hosts}: use gloo, or auto, which takes "
            "shared memory for the groups that are on one host"
        )
