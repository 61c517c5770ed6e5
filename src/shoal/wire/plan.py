"""What a process is told before it starts to work: an engine, or an API server."""

from typing import Any

from shoal.wire.base import Wire


class ModelFiles(Wire, frozen=True):
    """Where a model and its draft model were found, as absolute paths, and in what state their files were then. A text
    is empty where there is no such thing, or nobody has looked."""

    folder: str
    draft_folder: str = ""
    state: str = ""
    draft_state: str = ""


class ApiSetup(Wire, frozen=True):
    """The first message to an API server process: the model and its options, and what `shoal serve` was told besides.
    `sockets` are the descriptors at which it accepts connections."""

    model: str | None
    options: dict[str, Any]
    settings: dict[str, Any]
    listening: dict[str, Any]
    max_model_len: int = 0  # that the replicas have; 0: the process decides itself
    number: int = 0
    sockets: tuple[int, ...] = ()
    files: ModelFiles | None = None  # as in EngineSetup


class ReplicaPlace(Wire, frozen=True):
    """Where a replica stands among those of its data-parallel group."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the replicas on its host, which share its devices and memory
    local_size: int = 1
    memory_available: int = 0  # bytes the host had when its first replica was planned; 0: to be looked up
    rendezvous: str = ""  # host:port of where replicas in lockstep, and their ranks, meet
    key: str = ""  # shared secret of those who meet there
    address: str = "127.0.0.1"  # of this host, as others reach it
    meeting: int = 0  # which of those that these processes have there, one after the other
    returning: bool = False  # it has been ready before: who is not there any more has failed, nothing is set wrong


class EngineSetup(Wire, frozen=True):
    """The first message to an engine process: what `LLM(...)` was given. It answers with its stats when it is ready."""

    model: str | None
    options: dict[str, Any]
    place: ReplicaPlace = ReplicaPlace()
    files: ModelFiles | None = None  # None: they are still to be looked for
