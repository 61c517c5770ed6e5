"""What the doctor checks in a Ray cluster, with made-up nodes; `tests/cluster/test_ray.py` has a real cluster."""

import pytest

from shoal.doctor.ray_checks import RayNode, check, check_addresses, check_nodes, check_resources
from shoal.doctor.ray_run import merge
from shoal.wire.doctor import DoctorReport, Finding
from shoal.wire.topology import ClusterTopology, Device, HostPair, HostTopology, Interface

NODES = tuple(RayNode(f"{i}234567890", f"10.0.0.{i}", {"CPU": 4.0}) for i in range(3))


def host(number: int, **changes: object) -> HostTopology:
    fields = {
        "name": f"h{number}",
        "rank": number,
        "address": f"10.0.0.{number}",
        "cores": (0, 1, 2, 3),
        "interfaces": (
            Interface(name="eth0", addresses=(f"10.0.0.{number}",)),
            Interface(name="ib0", addresses=(f"10.1.0.{number}",)),
        ),
    }
    return HostTopology(**{**fields, **changes})  # type: ignore[arg-type]


def only(found: list[Finding]) -> tuple[str, str]:
    (finding,) = found
    assert bool(finding.mend) == (finding.level != "ok")
    return finding.level, finding.text


def test_a_cluster_in_order_has_a_line_for_each_check() -> None:
    found = check(NODES, {}, {node.id: host(i) for i, node in enumerate(NODES)})
    assert [(each.kind, each.level) for each in found] == [
        ("ray-nodes", "ok"),
        ("ray-address", "ok"),
        ("ray-resources", "ok"),
    ]
    assert found[0].text == "3 nodes of the cluster, all alive"
    assert "h1: 4 CPU and 0 GPU" in found[2].text


def test_dead_nodes_are_listed_with_the_reason() -> None:
    dead = RayNode("9234567890", "10.0.0.9", dead="health check failed")
    assert only(check_nodes([*NODES, dead], {})) == ("warning", "10.0.0.9 (92345678) is dead: health check failed")
    back = RayNode("9234567890", "10.0.0.1", dead="it was stopped")
    level, text = only(check_nodes([*NODES, back], {}))
    assert (level, "another node has its address" in text) == ("ok", True)


def test_a_node_without_shoal_is_a_failure() -> None:
    level, text = only(check_nodes(NODES, {NODES[1].id: "ModuleNotFoundError: No module named 'shoal'"}))
    assert level == "failure"
    assert text == "the doctor did not run on 10.0.0.1 (12345678): ModuleNotFoundError: No module named 'shoal'"


@pytest.mark.parametrize(
    ("node", "reached", "text"),
    [
        ("10.1.0.1", "10.0.0.1", "Ray knows h1 as 10.1.0.1 (ib0), and connections between ranks use 10.0.0.1 (eth0)"),
        ("172.17.0.2", "10.0.0.1", "as 172.17.0.2, which it does not have: it has 10.0.0.1 (eth0), 10.1.0.1 (ib0)"),
    ],
)
def test_another_address_in_ray_is_a_warning(node: str, reached: str, text: str) -> None:
    level, told = only(check_addresses([(RayNode("1", node), host(1, address=reached))]))
    assert level == "warning"
    assert text in told


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"CPU": 4.0, "GPU": 2.0}, None),
        ({"CPU": 2.0, "GPU": 2.0}, None),
        ({"CPU": 4.0, "GPU": 4.0}, ("failure", "Ray counts 4 GPU on h0 (10.0.0.0), which has 2")),
        ({"CPU": 4.0}, ("warning", "Ray counts 0 GPU on h0 (10.0.0.0), which has 2: others stay idle")),
        (
            {"CPU": 8.0, "GPU": 2.0},
            ("warning", "Ray counts 8 CPU on h0 (10.0.0.0), which may use 4 cores: ranks would share them"),
        ),
    ],
)
def test_resources_are_compared_with_the_devices(resources: dict[str, float], expected: tuple[str, str] | None) -> None:
    devices = (Device(index=0), Device(index=1), Device(index=2, visible=False))
    found = only(check_resources([(RayNode("0", "10.0.0.0", resources), host(0, devices=devices))]))
    assert found == (expected or ("ok", f"what Ray counts is there (h0: {resources['CPU']:g} CPU and 2 GPU)"))


def report(*ranks: int, text: str) -> DoctorReport:
    """Return the report of a doctor that has met those of these ranks. One alone names no host."""
    pairs = (HostPair(source=0, target=1, latency_us=5.0),) if len(ranks) > 1 else ()
    label = "all hosts" if len(ranks) > 1 else ""
    topology = ClusterTopology(hosts=tuple(host(rank) for rank in ranks), pairs=pairs)
    return DoctorReport(findings=(Finding(kind="cores", level="ok", text=text, host=label),), topology=topology)


def test_doctors_that_have_met_give_one_report() -> None:
    both = report(0, 1, 2, text="together")
    found = merge(NODES, [both, both, both], NODES, {})
    assert [each.text for each in found.findings if each.host == "all hosts"] == ["together"]
    assert {each.kind for each in found.findings if each.host == "Ray cluster"} == {
        "ray-nodes",
        "ray-address",
        "ray-resources",
    }
    assert (found.topology, found.failed) == (both.topology, False)


def test_doctors_that_have_not_met_give_what_each_has_found() -> None:
    found = merge(NODES, [report(0, text="first"), None, report(2, text="third")], NODES, {NODES[1].id: "it hangs"})
    assert [(each.host, each.text) for each in found.findings][:2] == [
        ("host 0 (h0)", "first"),
        ("host 2 (h2)", "third"),
    ]
    assert [host.rank for host in found.topology.hosts] == [0, 2]
    assert found.failed


def test_a_cluster_where_no_doctor_ran_has_a_report_too() -> None:
    found = merge(NODES, [], [], {node.id: "No module named 'shoal'" for node in NODES})
    assert [each.level for each in found.findings if each.kind == "ray-nodes"] == ["failure"] * 3
