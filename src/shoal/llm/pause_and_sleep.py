"""Pauses, sleep and resets of caches with the names that vLLM's AsyncLLM has."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from shoal.activity import ActivityState
from shoal.wire.base import encode
from shoal.wire.fleet import FleetStatus, Operation


class Operable(ABC):
    """Whoever can ask those who have the replicas. Each call is for all of these, and returns when all are done."""

    @abstractmethod
    async def ask(self, verb: str, payload: bytes = b"", *, patient: bool = False) -> bytes: ...

    @abstractmethod
    async def status(self) -> FleetStatus: ...

    async def operate(self, wanted: Operation) -> bytes:
        """Waits until it is done, however long that takes.

        Raises:
            UserError: it can't be done.
            EngineError: nobody is there.
        """
        return await self.ask("operate", encode(wanted), patient=True)

    async def pause_generation(
        self, *, mode: str = "abort", wait_for_inflight_requests: bool = False, clear_cache: bool = True
    ) -> None:
        """Returns when nothing is computed any more. `mode`: what becomes of requests: "abort" ends them; with "wait"
        those that a replica has end first; with "keep" they stand still, and go on with the same tokens. New ones wait.
        `clear_cache`: prefixes are forgotten, unless requests are kept.

        Raises:
            ConfigError: there is no such mode, or `resume_generation` was called before requests had ended.
        """
        mode = "wait" if wait_for_inflight_requests and mode == "abort" else mode
        await self.operate(Operation("pause", mode=mode, clear_cache=clear_cache))

    async def resume_generation(self) -> None:
        """
        Raises:
            ConfigError: it is asleep.
        """
        await self.operate(Operation("resume"))

    async def is_paused(self) -> bool:
        """Is nothing computed, be it paused or asleep?"""
        return (await self.status()).activity != ActivityState.AWAKE

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """As `LLM.sleep`, after a pause with this `mode`; requests that are kept compute what was in the KV cache
        again. New ones are refused.

        Raises:
            ConfigError: there is no such mode or level, or replicas at other addresses compute with these.
        """
        await self.operate(Operation("sleep", mode=mode, level=level))

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """As `LLM.wake_up`. With its last part it runs, be it paused before.

        Raises:
            UserError: the files of the weights are not what they were: it is still asleep; or there is no such part.
        """
        await self.operate(Operation("wake_up", tags=None if tags is None else tuple(tags)))

    async def is_sleeping(self) -> bool:
        return (await self.status()).activity == ActivityState.ASLEEP

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As `LLM.reset_prefix_cache`."""
        await self.operate(Operation("reset_prefix_cache", running=reset_running_requests))
        return True
