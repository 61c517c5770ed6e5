"""What the doctors of several hosts tell each other, and what `shoal doctor --json` prints.

These are documents, not messages: the hosts may have different versions of Shoal, which the doctor reports.
"""

from typing import Literal

import msgspec

from shoal.devices.hardware import Hardware
from shoal.wire.topology import AllReduceSpeed, ClusterTopology, Document, HostPair, HostTopology

Level = Literal["ok", "warning", "failure"]


class Finding(Document, frozen=True):
    """The result of a check."""

    kind: str  # a row of the table of findings (`doctor.kinds`)
    level: Level
    text: str  # what was found, with the numbers
    mend: str = ""  # the command or the change that mends it; empty if nothing is wrong
    host: str = ""


class HostExamination(Document, frozen=True):
    """The findings and facts of one host."""

    topology: HostTopology
    findings: tuple[Finding, ...] = ()
    versions: dict[str, str] = msgspec.field(default_factory=dict)
    variables: dict[str, str] = msgspec.field(
        default_factory=dict
    )  # environment variables that change how ranks communicate
    model: dict[str, str] = msgspec.field(
        default_factory=dict
    )  # digests of the model's files, and the options that must be equal
    has_gpus: bool = False  # NCCL can be tried on it
    hardware: Hardware | None = None  # as the planner sees it; None if no model is planned


class Measurements(Document, frozen=True):
    """The measurements of one host between itself and the others."""

    pairs: tuple[HostPair, ...] = ()
    all_reduce: tuple[AllReduceSpeed, ...] = ()  # over all hosts
    findings: tuple[Finding, ...] = ()


class DoctorReport(Document, frozen=True):
    """The whole result of a run."""

    findings: tuple[Finding, ...]
    topology: ClusterTopology
    layouts: tuple["LayoutFit", ...] = ()  # of a model on this host
    layouts_over_hosts: tuple["LayoutFit", ...] = ()  # of one replica over all hosts

    @property
    def failed(self) -> bool:
        return any(each.level == "failure" for each in self.findings)


class LayoutFit(Document, frozen=True):
    """The answer whether a model fits on this host in one layout."""

    tensor_parallel_size: int
    pipeline_parallel_size: int
    fits: bool
    reason: str = ""  # why it does not fit
    weight_bytes: int | None = None  # of the rank with the most
    kv_tokens: int | None = None  # how many tokens the KV cache of a replica holds; None if a GPU will measure it
    replicas: int = 0  # how many such replicas fit beside each other
