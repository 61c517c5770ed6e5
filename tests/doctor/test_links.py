"""Links between GPUs, from what nvidia-smi and rocm-smi print."""

from collections import Counter

import pytest

from shoal.doctor import links
from shoal.doctor.links import LinkFacts, PcieLink
from shoal.wire.doctor import Finding
from shoal.wire.topology import Device
from support import gpu_outputs
from support.recorded_host import Tree, recorded


def devices(count: int, kind: str = "cuda") -> list[Device]:
    return [
        Device(index=index, kind="rocm" if kind == "rocm" else "cuda", bus=f"0000:{index:02x}:00.0")
        for index in range(count)
    ]


def levels(findings: list[Finding]) -> dict[str, str]:
    return {finding.kind: finding.level for finding in findings}


def test_gpus_behind_nvswitches(tree: Tree) -> None:
    outputs = {
        "nvidia-smi topo -m": gpu_outputs.DGX_TOPOLOGY,
        "nvidia-smi nvlink --status": gpu_outputs.DGX_NVLINKS,
        "nvidia-smi -q": gpu_outputs.FABRIC.format(first="Completed", status="Success"),
    }
    facts = links.gather(devices(8), recorded(outputs), tree({}))
    assert len(facts.links) == 8 * 7 // 2
    assert {(link.kind, link.path, link.links) for link in facts.links} == {("nvswitch", "NV18", 18)}
    assert facts.links[0].bandwidth == pytest.approx(18 * 26.562e9)
    assert {(link.first, link.second) for link in facts.links} == {(a, b) for a in range(8) for b in range(a + 1, 8)}
    found = links.check(facts, devices(8))
    assert levels(found) == {"device-links": "ok", "link-down": "ok", "fabric": "ok"}
    assert "NVSwitch (NV18)" in found[0].text


def test_bridges_between_two_and_two() -> None:
    outputs = {
        "nvidia-smi topo -m": gpu_outputs.BRIDGED_TOPOLOGY,
        "nvidia-smi nvlink --status": gpu_outputs.BRIDGED_NVLINKS,
        "nvidia-smi -q": "",
    }
    facts = links.gather(devices(4), recorded(outputs))
    ways = {(link.first, link.second): link.kind for link in facts.links}
    assert [pair for pair, kind in ways.items() if kind == "nvlink"] == [(0, 1), (2, 3)]
    assert Counter(ways.values())["pcie"] == 4
    found = links.check(facts, devices(4))
    assert levels(found) == {"device-links": "warning", "link-down": "warning"}
    assert "1 of GPU 3" in found[1].text
    hidden = [Device(index=each.index, visible=each.index < 2) for each in devices(4)]
    assert levels(links.check(facts, hidden)) == {"device-links": "ok", "link-down": "ok"}, "hidden GPUs do not count"


def test_cards_without_nvlink() -> None:
    facts = links.gather(devices(2), recorded({"nvidia-smi topo -m": gpu_outputs.WORKSTATION_TOPOLOGY}))
    assert [(link.kind, link.path, link.bandwidth) for link in facts.links] == [("pcie", "PHB", None)]
    assert levels(links.check(facts, devices(2))) == {"device-links": "ok"}


@pytest.mark.parametrize(
    ("first", "status", "level", "words"),
    [
        ("Completed", "Success", "ok", "ready"),
        ("In Progress", "N/A", "failure", "GPU 0: In Progress"),
        ("Not Started", "N/A", "failure", "GPU 0: Not Started"),
        ("Completed", "Insufficient Resources", "failure", "GPU 0: Insufficient Resources"),
    ],
)
def test_the_fabric_of_nvswitches(first: str, status: str, level: str, words: str) -> None:
    facts = LinkFacts(fabric=links.read_fabric(gpu_outputs.FABRIC.format(first=first, status=status)))
    (finding,) = links.check(facts, devices(2))
    assert (finding.kind, finding.level) == ("fabric", level)
    assert words in finding.text


def test_a_host_without_a_fabric() -> None:
    text = gpu_outputs.FABRIC.format(first="N/A", status="N/A").replace("Completed", "N/A")
    assert links.read_fabric(text) == {}


def test_infinity_fabric() -> None:
    facts = links.gather(devices(4, "rocm"), recorded({"rocm-smi --showtopo": gpu_outputs.ROCM_TOPOLOGY}))
    assert len(facts.links) == 6
    assert {(link.kind, link.path, link.links) for link in facts.links} == {("infinity-fabric", "XGMI", 1)}
    (finding,) = links.check(facts, devices(4, "rocm"))
    assert (finding.level, "Infinity Fabric (XGMI)" in finding.text) == ("ok", True)


def test_the_newer_tool_of_amd() -> None:
    facts = links.gather(devices(3, "rocm"), recorded({"amd-smi topology": gpu_outputs.AMD_TOPOLOGY}))
    assert [(link.first, link.second, link.kind, link.links) for link in facts.links] == [
        (0, 1, "infinity-fabric", 1),
        (0, 2, "pcie", 0),
        (1, 2, "pcie", 0),
    ]
    (finding,) = links.check(facts, devices(3, "rocm"))
    assert (finding.kind, finding.level) == ("device-links", "warning")


def test_cards_of_amd_over_pcie() -> None:
    found = links.read_rocm(gpu_outputs.ROCM_PCIE)
    assert {(link.kind, link.links) for link in found} == {("pcie", 0)}


def test_a_gpu_with_too_few_lanes(tree: Tree) -> None:
    names = ("current_link_width", "max_link_width", "current_link_speed", "max_link_speed")
    values = {
        "0000:00:00.0": ("16", "16", "2.5 GT/s PCIe", "32.0 GT/s PCIe"),
        "0000:01:00.0": ("4", "16", "32.0 GT/s PCIe", "32.0 GT/s PCIe"),
    }
    root = tree(
        {
            f"sys/bus/pci/devices/{bus}/{name}": f"{value}\n"
            for bus, row in values.items()
            for name, value in zip(names, row, strict=True)
        }
    )
    facts = links.gather(devices(2), recorded({}), root)
    assert facts.pcie == {0: PcieLink(16, 16, 2.5, 32.0), 1: PcieLink(4, 16, 32.0, 32.0)}
    pcie = [finding for finding in links.check(facts, devices(2)) if finding.kind == "pcie"]
    assert [(finding.level, "GPU 1: 4 of 16 lanes" in finding.text) for finding in pcie] == [("warning", True)]


def test_a_tool_that_is_missing_is_a_finding() -> None:
    found = links.check(links.gather(devices(2), recorded({})), devices(2))
    assert levels(found) == {"check-failed": "warning"}


@pytest.mark.parametrize("text", ["", "garbage\n\tX\n", "GPU0\n", "GPU0 X\nGPU1\n"])
def test_other_texts_give_no_links(text: str) -> None:
    assert links.read_topology(text) == ()
    assert links.read_rocm(text) == ()
    assert links.read_amd(text) == ()
    assert links.read_fabric(text) == {}
