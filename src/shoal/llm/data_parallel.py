"""Data parallelism by hand: the user starts one process for each replica, on one host or on several."""

import json
import os
from collections.abc import Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, TypeVar

from shoal import env
from shoal.addresses import Address, refuse_loopback_name
from shoal.config.engine_options import ClusterTlsOptions, from_environment
from shoal.errors import ConfigError, EngineError
from shoal.launch.credentials import credentials_of_host, log_protection
from shoal.log import get_logger
from shoal.process.forks import Owner
from shoal.transport.rendezvous import Rendezvous
from shoal.transport.room_member import RoomMember

log = get_logger("data parallel")

T = TypeVar("T")
_ROOM = "job"
_DONE = "all results are there"
_RESULTS_S = 24 * 3600.0
_MOST_NAMED = 5  # the most prompt numbers in an error message


class DataParallelRank:
    """A process of a data-parallel job, connected to the others. An `LLM` of this process is one of its replicas.

    with DataParallelRank.from_environment() as job, LLM(model) as llm:
        mine = job.share(prompts)
        outputs = llm.generate(list(mine.values()))
        texts = job.gather(dict(zip(mine, [output.outputs[0].text for output in outputs])))
    """

    def __init__(
        self,
        place: env.DataParallel,
        *,
        key: str = "",
        cluster_tls: str | PathLike[str] | None = None,
        timeout: float = 600.0,
        results_timeout: float = _RESULTS_S,
    ) -> None:
        """Wait until all processes of the job have connected. Rank 0 listens at the master's address.

        Args:
            place: the number of this process, and the master's address.
            key: the shared key of the job.
            cluster_tls: the folder with the certificates of this host, which encrypt the connections between hosts; the
                `LLM` of this process needs the same. None: they are not encrypted.
            timeout: how long to wait for the others, in seconds.
            results_timeout: how long `gather` waits for the slowest rank, in seconds. Ranks that fail are noticed
                sooner.

        Raises:
            ConfigError: the address cannot be used, or other hosts reach it and there is no key, or the certificates
                cannot be used, or a process did not connect in time, or two have the same number.
        """
        self.rank = place.rank
        self.size = place.size
        self._owner = Owner("DataParallelRank")
        self._results_timeout = results_timeout
        self._gathered = 0
        address = Address(place.master_ip, place.master_port)
        if place.size_local < place.size:
            refuse_loopback_name(place.master_ip, "SHOAL_DP_MASTER_IP")
        tls = ClusterTlsOptions(None if cluster_tls is None else os.fspath(cluster_tls))
        credentials = credentials_of_host(tls, key)
        log_protection(credentials, address.host)
        self._rendezvous = Rendezvous(address.host, address.port, credentials=credentials) if self.rank == 0 else None
        self._total = 0
        try:
            self._member = RoomMember(address, credentials, room=_ROOM, rank=self.rank, size=self.size, timeout=timeout)
        except BaseException:
            self._close_rendezvous()
            raise
        log.info("rank %d of %d: all are connected: %s", self.rank, self.size, ", ".join(self._member.members))

    @classmethod
    def from_environment(cls, *, timeout: float = 600.0, results_timeout: float = _RESULTS_S) -> "DataParallelRank":
        """Connect with the settings of the environment.

        They are SHOAL_DP_RANK, SHOAL_DP_SIZE, SHOAL_DP_MASTER_IP and SHOAL_DP_MASTER_PORT (or VLLM_DP_*),
        SHOAL_CLUSTER_KEY for the key, and SHOAL_CLUSTER_TLS for the folder with the certificates.

        Raises:
            ConfigError: a variable is missing or wrong, or the processes could not connect.
        """
        place = env.data_parallel()
        if place is None:
            raise ConfigError(
                "SHOAL_DP_RANK and SHOAL_DP_SIZE are not set: start one process for each rank, and set them to its "
                "number and to the number of ranks"
            )
        return cls(
            place,
            key=env.cluster_key(),
            cluster_tls=from_environment().get("cluster_tls"),
            timeout=timeout,
            results_timeout=results_timeout,
        )

    def share(self, prompts: Sequence[T]) -> dict[int, T]:
        """Return this rank's share of the prompts, by index.

        Prompts are dealt out one by one, so that neighbouring long prompts go to different ranks. The shares differ by
        at most one prompt.
        """
        self._total = len(prompts)
        return {index: prompts[index] for index in _indices(self.rank, self.size, len(prompts))}

    def gather(self, results: Mapping[int, Any]) -> list[Any] | None:
        """Collect the results of all ranks at rank 0.

        All ranks wait until all results have arrived, so that no replica ends while others still need its ranks. All
        ranks may call it again later.

        Args:
            results: this rank's results by the index of their prompt. Values must be plain data that JSON can hold.

        Returns:
            On rank 0 the results of all prompts, in order; None on other ranks.

        Raises:
            EngineError: a rank failed or was too late (the message names it and its prompts), or this process was
                forked from the rank.
        """
        self._owner.check()
        payload = json.dumps([[index, value] for index, value in results.items()]).encode()
        self._gathered += 1  # a new topic each time, as the posts of earlier calls are still there
        topic, done = f"results {self._gathered}", f"{_DONE} {self._gathered}"
        parts = self._member.collect(topic, payload, timeout=self._results_timeout, describe=self._describe)
        if parts is None:
            self._member.await_post(done, 0, timeout=self._results_timeout)
            return None
        found = dict(pair for part in parts for pair in json.loads(part))
        missing = [index for index in range(self._total) if index not in found]
        if missing:
            raise EngineError(f"{len(missing)} of {self._total} prompts have no result: {_name_some(missing)}")
        self._member.post(done, b"")
        return [found[index] for index in sorted(found)]

    def _describe(self, rank: int) -> str:
        indices = list(_indices(rank, self.size, self._total))
        return f"rank {rank} with {len(indices)} of {self._total} prompts, {_name_some(indices)}"

    def close(self, why: str = "") -> None:
        """Leave the job. In a forked child it does nothing.

        Args:
            why: the failure that the other ranks are told; empty if there was none.
        """
        if not self._owner.is_here:
            return
        self._member.close(why)
        self._close_rendezvous()

    def _close_rendezvous(self) -> None:
        if self._rendezvous is not None:
            self._rendezvous.close()

    def __enter__(self) -> "DataParallelRank":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("" if kind is None else f"failed: {error or kind.__name__}")


def _indices(rank: int, size: int, total: int) -> range:
    return range(rank, total, size)


def _name_some(indices: Sequence[int]) -> str:
    first = ", ".join(map(str, indices[:_MOST_NAMED]))
    return f"numbers {first}" + (", ..." if len(indices) > _MOST_NAMED else "") if indices else "none of them"
