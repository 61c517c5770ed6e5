"""A real all-reduce between processes, for `shoal doctor`.

There is a process for each rank: `python -m shoal.worker.all_reduce_probe --fd N --parent PID`. Its first message is
the question, a frame of JSON. It answers with frames of JSON: what PyTorch finds, one for each backend, and a last one.
The ranks are of one host, and meet in a file that all have inherited; or of several, and meet at a rendezvous.
"""

import json
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any, Literal

import click
import torch

from shoal.comm.base import Communicator
from shoal.comm.process_comm import ProcessComm
from shoal.comm.shared_file_store import SharedFileStore
from shoal.comm.shared_memory_library import load_library
from shoal.comm.threads import ThreadComm, ThreadGroup
from shoal.errors import ShoalError
from shoal.transport.channel import Channel, wait
from shoal.transport.process import die_with_parent
from shoal.wire.credentials import credentials_decoder
from shoal.worker.rendezvous_store import RendezvousStore

_QUESTION_S = 10.0
_FLUSH_S = 5.0
_SMALL, _WARM_UP = 8, 3  # numbers in the tensor that measures latency; runs that are not counted


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
def main(fd: int, parent: int) -> None:
    die_with_parent(parent)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent ends its children
    channel = Channel.from_fd(fd)
    wait([channel], _QUESTION_S)
    question = json.loads(channel.receive(1)[0])
    torch.set_num_threads(1)
    for answer in answers(question):
        channel.send(json.dumps(answer).encode())
        channel.flush(_FLUSH_S)


def answers(question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield what PyTorch finds, and the result of each backend."""
    yield {"torch": describe_torch()}
    places = Places(question)
    for backend in question["backends"]:
        yield {"began": backend}
        try:
            yield {"backend": backend, **places.measure(backend)}
        except (ShoalError, RuntimeError, OSError) as error:
            yield {"backend": backend, "error": (str(error).strip().splitlines() or [type(error).__name__])[0]}
    yield {"done": True}


def describe_torch() -> dict[str, Any]:
    """Return the versions of PyTorch and its libraries, and the devices that it can use."""
    cuda = torch.cuda.is_available()
    nccl = ""
    with suppress(Exception):  # a build without NCCL has no such function, or one that fails
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
    return {
        "version": str(torch.__version__),
        "cuda": torch.version.cuda or "",
        "rocm": getattr(torch.version, "hip", None) or "",
        "nccl": nccl if cuda else "",
        "devices": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())] if cuda else [],
        "backends": [
            name
            for name, there in (
                ("gloo", torch.distributed.is_gloo_available()),
                ("nccl", torch.distributed.is_nccl_available()),
            )
            if there
        ],
        "threads": torch.get_num_threads(),
    }


class Places:
    """The place where the ranks of a question meet."""

    def __init__(self, question: dict[str, Any]) -> None:
        self._question = question
        self._rank: int = question["rank"]
        self._store: Any = None
        self._interface = "127.0.0.1"

    def measure(self, backend: Literal["shm", "gloo", "nccl", "threads"]) -> dict[str, Any]:
        """Return whether the sums are right, the latency in microseconds, and the bytes per second of each rank."""
        if backend == "threads":
            return self._measure_threads()
        if backend == "nccl" and self._rank >= torch.cuda.device_count() and not self._question["rendezvous"]:
            return {"skipped": True}
        if backend == "shm" and load_library()[0] is None:
            return {"skipped": True}
        device = torch.device("cpu")
        if backend == "nccl":
            device = torch.device("cuda", 0 if self._question["rendezvous"] else self._rank)
            torch.cuda.set_device(device)
        size = self._question["sizes"][backend]
        comm = ProcessComm(
            *(self._meet(), f"doctor:{backend}", self._rank, size),
            requested="auto" if backend == "nccl" else backend,
            timeout_s=self._question["timeout_s"],
            device=device,
            interface_address=self._interface,
        )
        return measure(comm, device, self._question["bytes"][backend], self._question["repeat"])

    def _meet(self) -> Any:
        question = self._question
        if self._store is None and question["rendezvous"]:
            credentials = credentials_decoder.decode(bytes.fromhex(question["credentials"]))
            self._store = RendezvousStore(question["rendezvous"], credentials, timeout_s=question["timeout_s"])
            self._interface = self._store.host_address
        elif self._store is None:
            self._store = SharedFileStore(question["store"], timeout_s=question["timeout_s"])
        return self._store

    def _measure_threads(self) -> dict[str, Any]:
        """Measure ranks that are threads. Only rank 0 does so."""
        if self._rank:
            return {"skipped": True}
        size, question = self._question["sizes"]["threads"], self._question
        group = ThreadGroup(size, question["timeout_s"])
        found: list[dict[str, Any]] = []
        failed: list[BaseException] = []

        def run(rank: int) -> None:
            try:
                comm = ThreadComm(group, rank)
                answer = measure(comm, torch.device("cpu"), question["bytes"]["threads"], question["repeat"])
                found.append(answer)
            except (ShoalError, RuntimeError) as error:
                failed.append(error)
                group.abort()

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(question["timeout_s"])
        if failed:
            raise RuntimeError(str(failed[0]))
        return {
            "right": all(each["right"] for each in found) and len(found) == size,
            "us": max(each["us"] for each in found),
            "bytes_per_s": min(each["bytes_per_s"] for each in found),
        }


@torch.inference_mode()
def measure(comm: Communicator, device: torch.device, num_bytes: int, repeat: int) -> dict[str, Any]:
    """Check the sums of an all-reduce, and measure it with a small and with a large tensor."""
    large = num_bytes // 4
    pattern = torch.arange(large, device=device, dtype=torch.float32) % 17 + 1  # sums are exact in float32
    total = comm.all_reduce(pattern * (comm.rank + 1))
    right = bool(torch.equal(total, pattern * (comm.size * (comm.size + 1) // 2)))
    small = torch.zeros(_SMALL, device=device)
    latency = _median_time(lambda: comm.all_reduce(small), device, 5 * repeat)
    seconds = _median_time(lambda: comm.all_reduce(pattern), device, repeat)
    sent = 2 * large * 4 * (comm.size - 1) / comm.size if comm.size > 1 else large * 4
    return {"right": right, "us": 1e6 * latency, "bytes_per_s": sent / seconds}


def _median_time(work: Callable[[], Any], device: torch.device, repeat: int) -> float:
    times = []
    for _ in range(_WARM_UP + repeat):
        begun = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begun)
    return statistics.median(times[_WARM_UP:])


if __name__ == "__main__":
    main()
