"""Messages about a host that runs replicas for a front end elsewhere: its report, and those between its processes."""

from typing import Any

import msgspec

from shoal.devices.hardware import Hardware
from shoal.wire.base import Wire
from shoal.wire.engine import FromEngine
from shoal.wire.plan import ModelFiles, ReplicaPlace


class HostFacts(Wire, frozen=True):
    """A host as a planner needs to know it, before any replica is started there."""

    name: str
    hardware: Hardware
    cpu_kv_bytes: int | None = None  # the value of VLLM_CPU_KVCACHE_SPACE there, in bytes; None: it is not set


class HostReport(Wire, frozen=True):
    """The introduction of a host that runs replicas or ranks for a leader elsewhere, which plans them from it."""

    facts: HostFacts
    files: ModelFiles  # where the models lie on that host
    tokenizer_folder: str
    options: dict[str, Any]  # the engine options that were given there
    local_rank: int = 0  # as in `ReplicaPlace`
    local_size: int = 1
    address: str = ""  # of the host, as it wants to be reached; "": the one from which it connects


class HeadlessSetup(Wire, frozen=True):
    """The first message to a process with a replica for a front end elsewhere. The front end sends the plan."""

    place: ReplicaPlace  # with the address of the front end's rendezvous, and the credentials
    report: HostReport
    agreement: dict[str, str]  # of this host (`launch.agreement`)
    start_s: float  # deadline for the first connection to the front end, in seconds


class PlanReceived(Wire, frozen=True):
    """A note to the supervisor on a replica's own host: the front end has planned the replica."""

    shares_experts: bool  # no replica of the deployment works without the others


ToSupervisor = FromEngine | PlanReceived

host_report_decoder: msgspec.msgpack.Decoder[HostReport] = msgspec.msgpack.Decoder(HostReport)

headless_setup_decoder: msgspec.msgpack.Decoder[HeadlessSetup] = msgspec.msgpack.Decoder(HeadlessSetup)

to_supervisor: msgspec.msgpack.Decoder[ToSupervisor] = msgspec.msgpack.Decoder(ToSupervisor)
