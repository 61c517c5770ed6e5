"""GPUs as the tools list them, and what CUDA_VISIBLE_DEVICES hides."""

from pathlib import Path

import pytest

from shoal.doctor import accelerators
from shoal.doctor.accelerators import GpuFacts
from shoal.doctor.tools import ToolOutput
from shoal.wire.topology import Device
from support import gpu_outputs
from support.recorded_host import Tree, recorded

DGX = recorded({"nvidia-smi --query-gpu": gpu_outputs.DGX_QUERY})


def seen(monkeypatch: pytest.MonkeyPatch, variable: str | None) -> GpuFacts:
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    return accelerators.gather(DGX, Path("/nowhere"))


def test_the_listing_of_nvidia(monkeypatch: pytest.MonkeyPatch, tree: Tree) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    facts = accelerators.gather(DGX, tree({"sys/bus/pci/devices/0000:9d:00.0/numa_node": "1\n"}))
    assert len(facts.devices) == 8
    assert facts.driver == "550.54.15"
    first, fifth = facts.devices[0], facts.devices[4]
    assert (first.name, first.bus, first.memory) == ("NVIDIA H100 80GB HBM3", "0000:1b:00.0", 81559 << 20)
    assert (first.numa, fifth.numa) == (None, 1)
    assert {finding.level for finding in accelerators.check(facts)} == {"ok"}


@pytest.mark.parametrize(
    ("variable", "level", "words"),
    [
        (None, "ok", "not set: 8 GPUs"),
        ("2,3", "ok", "shows GPU 2, 3, hides GPU 0, 1, 4, 5, 6, 7"),
        ("GPU-00000001", "ok", "shows GPU 1, hides"),
        ("", "failure", "hides all 8 GPUs: it is empty or -1"),
        ("-1", "failure", "hides all 8 GPUs"),
        ("8", "failure", "hides all 8 GPUs: there is no GPU '8' (there are 0 to 7)"),
        ("0,1,9,2", "failure", "there is no GPU '9' (there are 0 to 7); it and all after it are ignored"),
        ("0,0", "failure", "hides all 8 GPUs: a GPU is named twice"),
        ("GPU-0", "failure", "stands for 8 GPUs"),
    ],
)
def test_what_the_variable_hides(monkeypatch: pytest.MonkeyPatch, variable: str | None, level: str, words: str) -> None:
    (finding,) = accelerators.check_visible(seen(monkeypatch, variable))
    assert (finding.kind, finding.level) == ("visible-devices", level)
    assert words in finding.text


def test_hidden_gpus_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = seen(monkeypatch, "5,0")
    assert [device.index for device in facts.visible] == [0, 5]


def test_a_host_without_gpus(tmp_path: Path) -> None:
    facts = accelerators.gather(recorded({}), tmp_path)
    (finding,) = accelerators.check(facts)
    assert (finding.kind, finding.level) == ("devices", "ok")


@pytest.mark.parametrize(("kind", "level"), [("0x030200", "failure"), ("0x068000", "warning")])
def test_a_tool_that_fails(tree: Tree, kind: str, level: str) -> None:
    """It is a failure if there is a GPU on the bus. NVIDIA also makes bridges and network cards."""
    words = "nvidia-smi: Failed to initialize NVML: Driver/library version mismatch"
    folder = "sys/bus/pci/devices/0000:1b:00.0"
    root = tree({f"{folder}/vendor": "0x10de\n", f"{folder}/class": f"{kind}\n"})
    (finding,) = accelerators.check(accelerators.gather(lambda _: ToolOutput(error=words), root))
    assert (finding.kind, finding.level, finding.text) == ("devices", level, words)


def test_a_driver_without_its_tool(tree: Tree) -> None:
    root = tree({"proc/driver/nvidia/version": "NVRM version: 550.54.15\n"})
    (finding,) = accelerators.check(accelerators.gather(recorded({}), root))
    assert (finding.kind, finding.level) == ("devices", "failure")


def test_gpus_of_amd(tmp_path: Path) -> None:
    facts = accelerators.gather(recorded({"rocm-smi": gpu_outputs.ROCM_QUERY}), tmp_path)
    assert [(each.index, each.kind, each.name, each.bus) for each in facts.devices] == [
        (0, "rocm", "AMD Instinct MI300X", "0000:c1:00.0"),
        (1, "rocm", "AMD Instinct MI300X", "0000:c6:00.0"),
    ]
    assert facts.devices[0].memory == 206141652992


def test_gpus_of_amd_without_its_tool(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = "sys/bus/pci/drivers/amdgpu/0000:c1:00.0"
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0")
    root = tree(
        {f"{folder}/mem_info_vram_total": "1000\n", f"{folder}/mem_info_vram_used": "10\n", "sys/module/amdgpu/x": ""}
    )
    facts = accelerators.gather(recorded({}), root)
    assert facts.devices == (Device(index=0, kind="rocm", name="AMD GPU", bus="0000:c1:00.0", memory=1000),)
    (shown,) = accelerators.check_visible(facts)
    assert (shown.level, shown.text) == ("ok", "HIP_VISIBLE_DEVICES='0' shows GPU 0")


def test_gpus_that_differ_and_others_memory() -> None:
    devices = tuple(Device(index=index, name=name, memory=1000) for index, name in enumerate(("A100", "T4")))
    found = {each.kind: each for each in accelerators.check(GpuFacts(devices, used=(10, 900)))}
    assert found["device-order"].level == "warning"
    assert found["device-memory"].level == "warning"
    assert "GPU 1" in found["device-memory"].text
    ordered = accelerators.check(GpuFacts(devices, used=(10, 10), order="PCI_BUS_ID"))
    assert {each.level for each in ordered} == {"ok"}
