"""An examination as a whole: parts that fail or hang, ranks that end, and hosts that are examined together."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shoal.doctor import all_reduce, runs
from shoal.doctor.concurrent import run_all
from shoal.doctor.examine import HostFindings, examine_host
from shoal.doctor.kinds import failure
from shoal.doctor.meeting import Peers
from shoal.doctor.settings import Settings
from shoal.wire.credentials import NO_CREDENTIALS
from shoal.wire.doctor import DoctorReport, Finding, HostExamination
from shoal.wire.topology import HostTopology, Interface
from support.recorded_host import recorded

WAIT_S = 20.0


def test_parts_that_fail_or_hang_disturb_no_others() -> None:
    release = threading.Event()

    def fail() -> None:
        raise OSError("no such file")

    found = run_all({"good": lambda: 7, "fails": fail, "hangs": release.wait}, 0.3)
    release.set()
    assert found["good"].value == 7
    assert found["fails"].error == "OSError: no such file"
    assert found["hangs"].error == "it did not end within 0.3 s"


def test_checks_that_cannot_be_made_are_findings(tmp_path: Path) -> None:
    """In an empty folder in place of the kernel's there is neither memory nor /dev/shm nor an interface."""
    found = examine_host(Settings(ranks=0, root=tmp_path), recorded({})).examination.findings
    levels = {(each.kind, each.level) for each in found}
    assert {("shared-memory", "failure"), ("interfaces", "warning"), ("python-version", "ok")} <= levels
    assert all(each.mend for each in found if each.level != "ok")


@pytest.mark.slow
def test_ranks_that_do_not_answer_in_time_are_named_and_ended() -> None:
    facts = all_reduce.measure_host(2, 0, 0.05)
    assert facts.error == "no answer within 0.05 s from rank 0 (loading PyTorch), rank 1 (loading PyTorch)"
    (finding,) = all_reduce.check(facts)
    assert (finding.kind, finding.level) == ("torch", "failure")


class _Group:
    """Doctors in threads of one process, which exchange payloads through a dictionary."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.posted: dict[str, dict[int, bytes]] = {}
        self.changed = threading.Condition()


class _ThreadPeers:
    def __init__(self, group: _Group, rank: int) -> None:
        self.rank, self.size, self.address, self.rendezvous = rank, group.size, "127.0.0.1", ""
        self.credentials = NO_CREDENTIALS
        self._group = group

    def exchange(self, topic: str, payload: bytes, timeout_s: float) -> dict[int, bytes]:
        with self._group.changed:
            found = self._group.posted.setdefault(topic, {})
            found[self.rank] = payload
            self._group.changed.notify_all()
            self._group.changed.wait_for(lambda: len(found) == self.size, timeout_s)
            return dict(found)

    def close(self) -> None:
        pass


def examined(rank: int, version: str = "1") -> HostFindings:
    address = f"10.0.0.{rank + 1}"
    topology = HostTopology(name=f"node{rank}", rank=rank, interfaces=(Interface(name="eth0", addresses=(address,)),))
    own: tuple[Finding, ...] = (failure("port", "taken"),) if rank == 1 else ()
    return HostFindings(HostExamination(topology=topology, versions={"Shoal": version}, findings=own))


def together(*hosts: HostFindings) -> list[DoctorReport]:
    group = _Group(len(hosts))

    def run(rank: int) -> DoctorReport:
        peers: Peers = _ThreadPeers(group, rank)
        return runs.examine_together(hosts[rank], peers, WAIT_S)

    with ThreadPoolExecutor(len(hosts)) as pool:
        return list(pool.map(run, range(len(hosts))))


def test_every_host_gets_the_whole_report() -> None:
    first, second, third = together(examined(0), examined(1), examined(2))
    assert first == second == third
    assert [host.name for host in first.topology.hosts] == ["node0", "node1", "node2"]
    assert len(first.topology.pairs) == 6
    assert first.failed
    assert [(each.host, each.kind) for each in first.findings if each.level == "failure"] == [
        ("host 1 (node1)", "port")
    ]


def test_hosts_with_different_versions() -> None:
    report = together(examined(0, "1.0"), examined(1, "2.0"))[0]
    (found,) = [each for each in report.findings if each.kind == "versions"]
    assert (found.level, found.host) == ("failure", "all hosts")
    assert found.text == "Shoal: 1.0 on host 0 (node0); 2.0 on host 1 (node1)"


@pytest.mark.slow
@pytest.mark.gpu
def test_nccl_is_tried_on_gpus() -> None:
    facts = all_reduce.measure_host(2, 1, 60)
    found = {result.backend: result for result in facts.results}
    assert (facts.error, found["nccl"].error, found["nccl"].right) == ("", "", True)
