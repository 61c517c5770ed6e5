"""What a run of the doctor is asked to look at."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.config.engine_options import ClusterTlsOptions
from shoal.devices import cpu

MEETING_PORT = 29501  # where the doctors of several hosts meet: the default port of `shoal serve --nnodes`


@dataclass(frozen=True, slots=True)
class Settings:
    """A run of the doctor. With `nnodes` above 1, the doctors of all hosts meet at `master`."""

    model: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # engine options for the question whether it fits
    ranks: int | None = None  # of the all-reduce on this host; None: one for each GPU, two without GPUs; 0: none
    nnodes: int = 1
    node_rank: int = 0
    master: str = ""
    master_port: int = MEETING_PORT
    tls: ClusterTlsOptions = field(default_factory=ClusterTlsOptions)
    timeout_s: float = 60.0  # the longest wait for other hosts
    local_timeout_s: float = 60.0  # the longest wait for a check of this host
    root: Path = cpu.ROOT  # the folder that contains proc, sys and dev

    @property
    def several_hosts(self) -> bool:
        return self.nnodes > 1
