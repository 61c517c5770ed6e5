"""A Ray cluster over hosts in network namespaces."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from support import hosts

PORT = 6379
ENVIRONMENT = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_memory_monitor_refresh_ms": "0"}
_START_S = 120.0


class RayNode:
    """Ray on one host: `ray start`, and the processes that belong to it."""

    def __init__(
        self,
        host: hosts.Host,
        *,
        head: hosts.Host | None = None,
        cpus: int,
        flags: Sequence[str] = (),
        environment: Mapping[str, str] = ENVIRONMENT,
    ) -> None:
        """Start Ray.

        Args:
            head: the host with the head node; None: this one.
            cpus: how many Ray counts, whatever the host has.
            flags: further flags of `ray start`.
        """
        self.host = host
        self._folder = tempfile.mkdtemp(prefix="ray")  # short, because Ray puts sockets into it
        self._cpus = cpus
        self._head = head
        self._flags = flags
        self._environment = environment
        self.start()

    @property
    def address(self) -> str:
        return f"{(self._head or self.host).address}:{PORT}"

    def start(self) -> None:
        role = (
            ["--head", f"--port={PORT}", "--include-dashboard=false"]
            if self._head is None
            else [f"--address={self.address}"]
        )
        ray = str(Path(sys.executable).parent / "ray")
        # Tests hide GPUs by this variable, and Ray refuses to count more of them than it names.
        without_choice_of_gpus = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
        command = [ray, "start", *role, f"--node-ip-address={self.host.address}", f"--num-cpus={self._cpus}"]
        subprocess.run(
            [*self.host.inside, *command, f"--temp-dir={self._folder}", "--object-store-memory=80000000", *self._flags],
            env={**without_choice_of_gpus, **self._environment},
            stdout=subprocess.DEVNULL,
            check=True,
            timeout=_START_S,
        )

    def pids(self) -> set[int]:
        """Return the processes of Ray on this host, and those of its actors."""
        listed = subprocess.run(
            ["ip", "netns", "pids", self.host.netns], capture_output=True, text=True, check=True
        ).stdout.split()
        return {int(pid) for pid in listed if _is_of_ray(int(pid))}

    def kill(self) -> None:
        """Kill everything of Ray on this host, like the end of the host."""
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._folder, ignore_errors=True)


def _is_of_ray(pid: int) -> bool:
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
    except OSError:
        return False
    return b"ray::" in command or b"/ray/" in command or b"ray start" in command


@contextmanager
def ray_cluster(
    two: tuple[hosts.Host, hosts.Host], cpus: int = 2, flags: Sequence[str] = ()
) -> Iterator[tuple[RayNode, RayNode]]:
    nodes: list[RayNode] = []
    try:
        nodes.append(RayNode(two[0], cpus=cpus, flags=flags))
        nodes.append(RayNode(two[1], head=two[0], cpus=cpus, flags=flags))
        yield nodes[0], nodes[1]
    finally:
        for node in reversed(nodes):
            node.close()
