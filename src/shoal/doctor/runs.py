"""A run of the doctor, on this host alone or together with the doctors of other hosts."""

import dataclasses
import socket
from collections.abc import Callable, Mapping, Sequence

import shoal
from shoal.doctor import all_reduce, compare, model_fit, pairs, ports
from shoal.doctor.concurrent import run_all
from shoal.doctor.examine import HostFindings, examine_host, report_of_host
from shoal.doctor.kinds import failure, warning
from shoal.doctor.meeting import Peers, RoomPeers
from shoal.doctor.settings import Settings
from shoal.errors import ConfigError, ShoalError
from shoal.launch.credentials import credentials_of_host, log_protection
from shoal.transport.rendezvous import require_key
from shoal.wire.doctor import DoctorReport, Finding, HostExamination, LayoutFit, Measurements
from shoal.wire.hosts import HostFacts
from shoal.wire.topology import ClusterTopology, D, HostTopology, decode_document, encode_document, with_fields

_ALL_HOSTS = "all hosts"
_REDUCE_S = 40.0  # the longest time for an all-reduce over hosts
_GRACE_S = 15.0


def run(settings: Settings) -> DoctorReport:
    """Examine this host, and with `nnodes` above 1 the connections to the others, and return the report.

    Raises:
        ConfigError: the key that the hosts share is missing, or the files for TLS cannot be used.
    """
    if not settings.several_hosts:
        return report_of_host(examine_host(settings))
    credentials = credentials_of_host(settings.tls)
    require_key(credentials.key, settings.master)
    log_protection(credentials, settings.master)
    first = settings.node_rank == 0
    own_port = ports.gather(settings.master, settings.master_port) if first else None
    return examine_with(settings, lambda: RoomPeers(settings, credentials, opens=first), own_port=own_port)


def examine_with(
    settings: Settings,
    meet: Callable[[], Peers],
    *,
    own_port: ports.PortFacts | None = None,
    versions: Mapping[str, str] | None = None,
) -> DoctorReport:
    """Examine this host while the others are awaited, and then all of them together.

    Args:
        meet: waits for the others, and returns them.
        own_port: see `examine_host`.
        versions: of further software, which the hosts compare.
    """
    outcomes = run_all(
        {"host": lambda: examine_host(settings, own_port=own_port), "meeting": meet},
        max(settings.timeout_s, settings.local_timeout_s) + _GRACE_S,
    )
    found, peers = outcomes["host"].value or _not_examined(settings, outcomes["host"].error), outcomes["meeting"].value
    if peers is None:
        return _alone(found, outcomes["meeting"].error)
    examined = found.examination
    examined = with_fields(examined, versions={**examined.versions, **(versions or {})})
    try:
        return examine_together(dataclasses.replace(found, examination=examined), peers, settings.timeout_s)
    finally:
        peers.close()


def _not_examined(settings: Settings, why: str) -> HostFindings:
    topology = HostTopology(name=socket.gethostname(), rank=settings.node_rank)
    return HostFindings(HostExamination(topology=topology, findings=(warning("check-failed", f"this host: {why}"),)))


def _alone(found: HostFindings, why: str) -> DoctorReport:
    report = report_of_host(found)
    return with_fields(report, findings=(*report.findings, failure("hosts", why.partition(": ")[2] or why)))


def examine_together(found: HostFindings, peers: Peers, timeout_s: float) -> DoctorReport:
    """Exchange what was found on each host, measure between the hosts, and return the report about all of them.

    All hosts call this at the same time, and each gets the whole report.
    """
    findings: list[Finding] = []
    own = with_fields(found.examination, topology=with_fields(found.examination.topology, address=peers.address))
    posted = peers.exchange("examination", encode_document(own), timeout_s)
    examined = _decode(HostExamination, posted, findings)
    examinations = [examined[rank] for rank in sorted(examined)]
    findings += compare.check_arrived(examined, range(peers.size), "examination")
    posted = peers.exchange("measurements", encode_document(_measure(peers, examinations, timeout_s)), timeout_s)
    everything = _decode(Measurements, posted, findings)
    findings += compare.check_arrived(everything, examined, "measurements")
    all_pairs = tuple(pair for rank in sorted(everything) for pair in everything[rank].pairs)
    speeds = compare.slowest_speeds([speed for each in everything.values() for speed in each.all_reduce])
    findings += _worst(everything)
    findings += compare.check(examinations, all_pairs, speeds)
    layouts = _plan_over_hosts(found.model, examinations, peers.size)
    if found.model and layouts:
        findings += model_fit.check(model_fit.ModelFacts(found.model.name, layouts), "all hosts together")
    return DoctorReport(
        findings=(*_named(examinations), *(with_fields(each, host=_ALL_HOSTS) for each in findings)),
        topology=ClusterTopology(
            shoal=shoal.__version__,
            hosts=tuple(each.topology for each in examinations),
            pairs=all_pairs,
            all_reduce=speeds,
            path=next((speed.path for speed in speeds if speed.backend == "nccl"), ""),
        ),
        layouts=found.layouts,
        layouts_over_hosts=layouts,
    )


def _plan_over_hosts(
    model: model_fit.ModelFacts | None, examinations: Sequence[HostExamination], size: int
) -> tuple[LayoutFit, ...]:
    """Plan one replica of the model over all hosts, if all of them were asked about a model."""
    hosts = [HostFacts(each.topology.name, each.hardware) for each in examinations if each.hardware is not None]
    if model is None or model.planner is None or len(hosts) < size:
        return ()
    return model.planner.layouts(hosts)


def _measure(peers: Peers, examinations: Sequence[HostExamination], timeout_s: float) -> Measurements:
    """Measure the connections to the other hosts, then an all-reduce with one rank on each host.

    NCCL is tried if every host has a GPU.
    """
    measured = Measurements()
    try:
        measured = Measurements(pairs=pairs.measure(peers, timeout_s))
        if not peers.rendezvous or len(examinations) < peers.size:
            why = "not all hosts have sent their examination" if peers.rendezvous else "the hosts have no rendezvous"
            return with_fields(measured, findings=(warning("check-failed", f"all-reduce over the hosts: {why}"),))
        backends = ["gloo", *(["nccl"] if all(each.has_gpus for each in examinations) else [])]
        facts = all_reduce.measure_between_hosts(
            peers.rank, peers.size, peers.rendezvous, peers.credentials, backends, _REDUCE_S
        )
    except (ShoalError, OSError) as error:
        found = warning("check-failed", f"measurements of host {peers.rank}: {error}")
        return with_fields(measured, findings=(found,))
    findings = tuple(all_reduce.check(facts, between_hosts=True))
    return with_fields(measured, findings=findings, all_reduce=all_reduce.speeds(facts))


def _decode(kind: type[D], posted: Mapping[int, bytes], findings: list[Finding]) -> dict[int, D]:
    """Return the documents of the hosts by rank. One that cannot be read is left out, with a finding."""
    found = {}
    for rank, payload in sorted(posted.items()):
        try:
            found[rank] = decode_document(kind, payload)
        except ConfigError as error:  # the host has a much older or newer version
            findings.append(failure("versions", f"what host {rank} has sent cannot be read: {error}"))
    return found


def _worst(everything: dict[int, Measurements]) -> list[Finding]:
    """Return the findings of the host that had the worst ones: every host has its own of the same all-reduce."""
    order = {"ok": 0, "warning": 1, "failure": 2}
    ranks = sorted(
        everything, key=lambda rank: max((order[each.level] for each in everything[rank].findings), default=0)
    )
    return list(everything[ranks[-1]].findings) if ranks else []


def _named(examinations: Sequence[HostExamination]) -> list[Finding]:
    return [
        with_fields(finding, host=compare.label(each.topology)) for each in examinations for finding in each.findings
    ]
