"""A real all-reduce between ranks that are processes: started here, measured there, and compared with what is usual."""

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.doctor import nccl_log
from shoal.doctor.kinds import KINDS, failure, ok, warning
from shoal.transport.channel import ChannelClosed, wait
from shoal.transport.process import ChildProcess, end_all
from shoal.values import format_bytes
from shoal.wire.base import encode
from shoal.wire.credentials import Credentials
from shoal.wire.doctor import Finding
from shoal.wire.topology import AllReduceSpeed

_MODULE = "shoal.worker.all_reduce_probe"
_BYTES = {"shm": 8 << 20, "gloo": 8 << 20, "threads": 8 << 20, "nccl": 64 << 20}
_HOST_BYTES = {"gloo": 4 << 20, "nccl": 64 << 20}
_REPEAT = 5
_MAX_LOG = 1 << 20


@dataclass(frozen=True, slots=True)
class Usual:
    """The usual speed of a backend: less is worth a warning. The text says what is usual."""

    most_us: float
    least_bytes_per_s: float
    text: str


USUAL = {
    "shm": Usual(1_000, 0.5e9, "1 to 50 us, 2 to 20 GB/s"),
    "gloo": Usual(5_000, 0.1e9, "50 us to 2 ms, 0.3 to 5 GB/s"),
    "threads": Usual(5_000, 0.1e9, "10 us to 1 ms, 0.5 to 10 GB/s"),
    "nccl": Usual(500, 4e9, "10 to 60 us; 5 to 25 GB/s over PCIe, 50 to 450 GB/s over NVLink or Infinity Fabric"),
}
USUAL_BETWEEN_HOSTS = {
    "gloo": Usual(20_000, 0.02e9, "0.1 to 5 ms; 0.1 GB/s on 1 Gbit/s, 1 to 4 GB/s on 25 to 100 Gbit/s"),
    "nccl": Usual(2_000, 0.1e9, "20 to 200 us; 1 to 5 GB/s over sockets, 10 to 50 GB/s over RDMA"),
}


@dataclass(slots=True)
class BackendResult:
    """The measurements of all ranks with one backend."""

    backend: str
    ranks: int
    right: bool = True
    us: float = 0.0  # of the slowest rank
    bytes_per_s: float = 0.0  # of the slowest rank
    error: str = ""
    path: str = ""  # from NCCL's log
    reason: str = ""  # what NCCL's log says about the network


@dataclass(slots=True)
class AllReduceFacts:
    """The results of a run. `torch`: what PyTorch finds in the ranks, None if it could not be loaded."""

    ranks: int
    torch: Mapping[str, Any] | None = None
    results: list[BackendResult] = field(default_factory=list)
    error: str = ""  # why the ranks could not answer


def measure_host(ranks: int, num_gpus: int, timeout_s: float) -> AllReduceFacts:
    """Run an all-reduce over `ranks` processes of this host with each backend, and return the results."""
    backends = ["shm", "gloo", "threads", *(["nccl"] if num_gpus else [])]
    sizes = {"shm": ranks, "gloo": ranks, "threads": ranks, "nccl": min(ranks, max(num_gpus, 1))}
    store = os.memfd_create("shoal-store")
    try:
        question = {"ranks": ranks, "store": store, "rendezvous": "", "credentials": "", "bytes": _BYTES}
        return _run({**question, "backends": backends, "sizes": sizes}, range(ranks), timeout_s, [store])
    finally:
        os.close(store)


def measure_between_hosts(
    rank: int, hosts: int, rendezvous: str, credentials: Credentials, backends: Sequence[str], timeout_s: float
) -> AllReduceFacts:
    """Take part in an all-reduce over all hosts, with one process on each. All hosts call this at the same time."""
    place = {"rendezvous": rendezvous, "credentials": encode(credentials).hex()}
    question = {"ranks": hosts, "store": -1, **place, "bytes": _HOST_BYTES}
    sizes = dict.fromkeys(("gloo", "nccl"), hosts)
    found = _run({**question, "backends": list(backends), "sizes": sizes}, [rank], timeout_s, [])
    found.ranks = hosts
    return found


def _run(question: Mapping[str, Any], ranks: Sequence[int], timeout_s: float, passed: Sequence[int]) -> AllReduceFacts:
    """Start a process for each of `ranks`, ask it, and collect the answers."""
    logs = [os.memfd_create("nccl-log") for _ in ranks]
    children: list[ChildProcess] = []
    question = {**question, "timeout_s": timeout_s / 2, "repeat": _REPEAT}
    try:
        for rank, log in zip(ranks, logs, strict=True):
            variables = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"/proc/self/fd/{log}", "OMP_NUM_THREADS": "1"}
            variables |= {"NCCL_DEBUG_SUBSYS": "INIT,NET,GRAPH,P2P,SHM"}
            child = ChildProcess(_MODULE, [], variables, [*passed, log])
            children.append(child)
            child.say(json.dumps({**question, "rank": rank}).encode())
        facts = _collect(children, question["sizes"], timeout_s)
        _add_log(facts.results, "\n".join(map(_read_log, logs)))
        return facts
    finally:
        end_all(children, None, 0)
        for log in logs:
            os.close(log)


def _read_log(fd: int) -> str:
    return os.pread(fd, _MAX_LOG, 0).decode(errors="replace")


def _add_log(results: Sequence[BackendResult], text: str) -> None:
    """Add what NCCL's log says to the result of NCCL: the way of the tensors, and the cause of an error."""
    log = nccl_log.classify(text)
    for result in results:
        if result.backend == "nccl":
            result.path, result.reason = log.path, log.reason
            if result.error and log.warnings:
                result.error = f"{result.error} (NCCL: {log.warnings[0].strip()})"


def _collect(children: Sequence[ChildProcess], sizes: Mapping[str, int], timeout_s: float) -> AllReduceFacts:
    """Collect the answers of all ranks until the last one has come, a rank ends early, or the time is over."""
    facts, deadline = AllReduceFacts(len(children)), time.monotonic() + timeout_s
    awaited, doing = dict(enumerate(children)), dict.fromkeys(range(len(children)), "loading PyTorch")
    results: dict[str, BackendResult] = {}
    while awaited and not facts.error:
        left = deadline - time.monotonic()
        readable = wait([child.channel for child in awaited.values()], left) if left > 0 else []
        if not readable:
            silent = ", ".join(f"rank {rank} ({doing[rank]})" for rank in awaited)
            facts.error = f"no answer within {timeout_s:g} s from {silent}"
        for rank, child in tuple(awaited.items()):
            if child.channel not in readable:
                continue
            try:
                frames = child.channel.receive()
            except ChannelClosed:
                facts.error = f"rank {rank} {child.describe_exit()} ({doing[rank]})"
                break
            for answer in map(json.loads, frames):
                if "done" in answer:
                    del awaited[rank]
                elif "torch" in answer:
                    facts.torch = facts.torch or answer["torch"]
                elif "began" in answer:
                    doing[rank] = f"all-reduce with {answer['began']}"
                elif not answer.get("skipped"):
                    _add(results, answer, sizes)
    facts.results = list(results.values())
    return facts


def _add(results: dict[str, BackendResult], answer: Mapping[str, Any], sizes: Mapping[str, int]) -> None:
    name = answer["backend"]
    found = results.setdefault(name, BackendResult(name, sizes[name], bytes_per_s=float("inf")))
    if "error" in answer:
        found.error = found.error or answer["error"]
        return
    found.right = found.right and answer["right"]
    found.us = max(found.us, answer["us"])
    found.bytes_per_s = min(found.bytes_per_s, answer["bytes_per_s"])


def check(facts: AllReduceFacts, *, between_hosts: bool = False) -> list[Finding]:
    """Check that every backend has added rightly, and compare the speeds with what is usual."""
    usual = USUAL_BETWEEN_HOSTS if between_hosts else USUAL
    found = [each for result in facts.results for each in _check_result(result, usual, between_hosts)]
    if facts.error:
        found.append(failure("all-reduce" if facts.torch is not None else "torch", facts.error))
    return found


def _check_result(result: BackendResult, usual: Mapping[str, Usual], between_hosts: bool) -> list[Finding]:
    what = f"{result.backend} over {result.ranks} {'hosts' if between_hosts else 'ranks'}"
    if result.error:
        return [failure("all-reduce", f"{what}: {result.error}", _mend_of(result.error))]
    if not result.right:
        return [failure("all-reduce", f"{what}: the sums are wrong")]
    by = f" by {result.path}" if result.path else ""
    by += f" ({result.reason})" if result.reason and between_hosts else ""
    speed = f"{what}{by}: {result.us:.0f} us, {format_bytes(result.bytes_per_s)}/s"
    expected = usual[result.backend]
    text = f"{speed} (usual: {expected.text})"
    if result.ranks > 1 and (result.us > expected.most_us or result.bytes_per_s < expected.least_bytes_per_s):
        return [ok("all-reduce", f"{what}: the sums are right"), warning("all-reduce-speed", text)]
    return [ok("all-reduce", f"{text}, the sums are right")]


_CAUSES = {  # words in an error -> the kind of finding whose way out helps
    "No space left": "shared-memory",
    "posix_fallocate": "shared-memory",
    "ibv_reg_mr": "locked-memory",
    "no socket interface": "interface-variables",
    "not yet initialized": "fabric",
    "driver version is insufficient": "torch-devices",
    "Too many open files": "open-files",
}


def _mend_of(error: str) -> str | None:
    """Return what mends the cause of an error; None if its words are not known."""
    return next((KINDS[kind].mend for words, kind in _CAUSES.items() if words.lower() in error.lower()), None)


def speeds(facts: AllReduceFacts) -> tuple[AllReduceSpeed, ...]:
    """Return the measured speeds, for the topology."""
    return tuple(
        AllReduceSpeed(
            backend=result.backend,
            ranks=result.ranks,
            latency_us=round(result.us, 1),
            bandwidth=round(result.bytes_per_s),
            path=result.path,
        )
        for result in facts.results
        if not result.error and result.right
    )
