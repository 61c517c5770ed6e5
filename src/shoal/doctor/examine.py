"""The examination of one host: facts are gathered at the same time, and then checked one after the other."""

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import shoal
from shoal import addresses
from shoal.doctor import accelerators, all_reduce, clock, cores, limits, links, model_fit, network, ports, software
from shoal.doctor.concurrent import Outcome, run_all
from shoal.doctor.kinds import warning
from shoal.doctor.settings import Settings
from shoal.doctor.tools import RunTool, run_tool
from shoal.wire.doctor import DoctorReport, Finding, HostExamination, LayoutFit
from shoal.wire.topology import ClusterTopology, HostTopology

_LEAST_RANKS, _MOST_RANKS = 2, 16
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HostFindings:
    """One examined host, in the form that hosts exchange, and the model that was planned."""

    examination: HostExamination
    model: model_fit.ModelFacts | None = None

    @property
    def layouts(self) -> tuple[LayoutFit, ...]:
        return self.model.layouts if self.model else ()


def examine_host(settings: Settings, run: RunTool = run_tool, own_port: ports.PortFacts | None = None) -> HostFindings:
    """Examine this host, in some seconds: what takes long runs at the same time.

    A check that cannot be made is a finding, and disturbs no other. `own_port`: whether this host can listen where the
    hosts meet, which must be known before they do.
    """
    gpus = _Facts(run_all({"devices": lambda: accelerators.gather(run, settings.root)}, settings.local_timeout_s))
    found = gpus.get("devices", accelerators.GpuFacts)
    devices = found.devices if found is not None else ()
    visible = found.visible if found is not None else ()
    ranks = settings.ranks
    if ranks is None:
        ranks = min(max(len(visible), _LEAST_RANKS), _MOST_RANKS)
    parts: dict[str, Callable[[], Any]] = {
        "cores": lambda: cores.gather(settings.root),
        "limits": lambda: limits.gather(settings.root),
        "network": lambda: network.gather(_target(settings), settings.root),
        "software": software.gather,
        "clock": clock.gather,
        "links": lambda: links.gather(devices, run, settings.root),
        "own connections": lambda: ports.gather("127.0.0.1"),
        "name": lambda: ports.gather_name(socket.gethostname()),
    }
    if ranks:
        parts["all-reduce"] = lambda: all_reduce.measure_host(ranks, len(visible), settings.local_timeout_s - 5)
    if settings.model is not None:
        model = settings.model
        parts["model"] = lambda: model_fit.gather(model, settings.options)
    facts = _Facts(run_all(parts, settings.local_timeout_s) | gpus.outcomes | {"port": Outcome(own_port)})
    planned = facts.get("model", model_fit.ModelFacts)
    return HostFindings(
        HostExamination(
            topology=_topology(settings, facts),
            findings=tuple(_check(settings, facts, ranks)),
            versions=_versions(facts),
            variables=_variables(facts),
            model=dict(planned.digests) if planned else {},
            has_gpus=bool(visible),
            hardware=planned.host.hardware if planned and planned.host else None,
        ),
        model=planned,
    )


def _target(settings: Settings) -> str:
    """Return the address for which the interface is asked: that of the first host; "" for any."""
    return "" if addresses.is_local(settings.master) else settings.master


class _Facts:
    """The facts that were gathered, by the name of the part."""

    def __init__(self, outcomes: dict[str, Outcome]) -> None:
        self.outcomes = outcomes

    def get(self, name: str, kind: type[T]) -> T | None:
        """Return the facts of a part; None if they could not be gathered."""
        value = self.outcomes[name].value if name in self.outcomes else None
        return value if isinstance(value, kind) else None


def _check(settings: Settings, facts: _Facts, ranks: int) -> Iterator[Finding]:
    for name, outcome in facts.outcomes.items():
        if outcome.error:
            yield warning("check-failed", f"{name}: {outcome.error}")
    for check in _checks(settings, facts, ranks):
        try:
            yield from check()
        except Exception as error:  # noqa: BLE001 - a mistake in one check must not hide the other findings
            yield warning("check-failed", f"{type(error).__name__}: {error}")


Check = Callable[[], list[Finding]]


def _checks(settings: Settings, facts: _Facts, ranks: int) -> Iterator[Check]:
    """Yield the checks whose facts are there, in the order of the report."""
    yield from _checks_of_machine(facts, ranks)
    yield from _checks_of_network(settings, facts)
    if reduced := facts.get("all-reduce", all_reduce.AllReduceFacts):
        yield lambda: all_reduce.check(reduced)
    if model := facts.get("model", model_fit.ModelFacts):
        yield lambda: model_fit.check(model)


def _checks_of_machine(facts: _Facts, ranks: int) -> Iterator[Check]:
    gpus = facts.get("devices", accelerators.GpuFacts)
    reduced = facts.get("all-reduce", all_reduce.AllReduceFacts)
    net = facts.get("network", network.NetworkFacts)
    visible = len(gpus.visible) if gpus else 0
    if installed := facts.get("software", software.Software):
        yield lambda: software.check(installed, reduced.torch if reduced else None, visible)
    if gpus:
        yield lambda: accelerators.check(gpus)
    if found := facts.get("links", links.LinkFacts):
        yield lambda: links.check(found, gpus.devices if gpus else ())
    if place := facts.get("cores", cores.CoreFacts):
        yield lambda: cores.check(place)
    if limited := facts.get("limits", limits.Limits):
        rdma = any(port.active for port in net.rdma) if net else False
        yield lambda: limits.check(limited, max(ranks, _LEAST_RANKS), visible, rdma=rdma)


def _checks_of_network(settings: Settings, facts: _Facts) -> Iterator[Check]:
    several, variables = settings.several_hosts, _variables(facts)
    if own := facts.get("own connections", ports.PortFacts):
        yield lambda: [ports.check_loopback(own)]
    if port := facts.get("port", ports.PortFacts):
        yield lambda: ports.check_master(port, nnodes=settings.nnodes)
    if name := facts.get("name", ports.AddressFacts):
        yield lambda: [ports.check_name(name, several_hosts=several)]
    if net := facts.get("network", network.NetworkFacts):
        addresses_here = [address for each in net.interfaces for address in each.addresses]
        if settings.node_rank > 0:
            yield lambda: ports.check_other_master(settings.master, settings.node_rank, addresses_here)
        yield lambda: network.check(net, variables, several_hosts=several)
    if time := facts.get("clock", clock.ClockFacts):
        yield lambda: clock.check(time, several_hosts=several)


def _topology(settings: Settings, facts: _Facts) -> HostTopology:
    gpus = facts.get("devices", accelerators.GpuFacts)
    place = facts.get("cores", cores.CoreFacts)
    net = facts.get("network", network.NetworkFacts)
    reduced = facts.get("all-reduce", all_reduce.AllReduceFacts)
    found = facts.get("links", links.LinkFacts)
    return HostTopology(
        name=socket.gethostname(),
        rank=settings.node_rank,
        address=net.chosen.addresses[0] if net and net.chosen else "",
        machine=_machine(settings.root),
        cores=place.hardware.cores if place else (),
        memory=place.hardware.host_memory if place else None,
        numa=place.nodes if place else (),
        devices=gpus.devices if gpus else (),
        links=found.links if found else (),
        interfaces=net.interfaces if net else (),
        rdma=net.rdma if net else (),
        all_reduce=all_reduce.speeds(reduced) if reduced else (),
    )


def _machine(root: Path) -> str:
    try:
        return (root / "proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _versions(facts: _Facts) -> dict[str, str]:
    installed = facts.get("software", software.Software)
    reduced = facts.get("all-reduce", all_reduce.AllReduceFacts)
    gpus = facts.get("devices", accelerators.GpuFacts)
    if installed is None:
        return {}
    return software.versions(installed, reduced.torch if reduced else None, gpus.driver if gpus else "")


def _variables(facts: _Facts) -> dict[str, str]:
    installed = facts.get("software", software.Software)
    return dict(installed.variables) if installed else {}


def report_of_host(found: HostFindings) -> DoctorReport:
    """Return the report of a run on one host."""
    topology = ClusterTopology(shoal=shoal.__version__, hosts=(found.examination.topology,))
    return DoctorReport(findings=found.examination.findings, topology=topology, layouts=found.layouts)
