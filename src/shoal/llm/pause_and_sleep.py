"""Methods to pause replicas, to let them sleep and to reset their caches, named as in vLLM's AsyncLLM."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from shoal.activity import ActivityState
from shoal.wire.base import encode
from shoal.wire.fleet import FleetStatus, Operation


class PauseAndSleep(ABC):
    """The operations on all replicas of a fleet. Each call returns when all replicas have done it."""

    @abstractmethod
    async def ask(self, verb: str, payload: bytes = b"", *, patient: bool = False) -> bytes: ...

    @abstractmethod
    async def status(self) -> FleetStatus: ...

    async def operate(self, wanted: Operation) -> bytes:
        """Have all replicas do an operation, and wait until it is done, without a deadline.

        Raises:
            UserError: it is impossible now.
            EngineError: the fleet does not run any more.
        """
        return await self.ask("operate", encode(wanted), patient=True)

    async def pause_generation(
        self, *, mode: str = "abort", wait_for_inflight_requests: bool = False, clear_cache: bool = True
    ) -> None:
        """Pause all replicas, and return when nothing is computed any more. New requests wait.

        Args:
            mode: what happens to requests that replicas have: "abort" ends them, "wait" waits for their end, "keep"
                halts them until they go on later with the same tokens.
            wait_for_inflight_requests: True is the same as `mode="wait"`.
            clear_cache: empty the prefix cache, unless requests are kept.

        Raises:
            ConfigError: there is no such mode, or `resume_generation` was called before the requests had ended.
        """
        mode = "wait" if wait_for_inflight_requests and mode == "abort" else mode
        await self.operate(Operation("pause", mode=mode, clear_cache=clear_cache))

    async def resume_generation(self) -> None:
        """Have paused replicas go on.

        Raises:
            ConfigError: they are asleep.
        """
        await self.operate(Operation("resume"))

    async def is_paused(self) -> bool:
        """Return True if nothing is computed, because the replicas are paused or asleep."""
        return (await self.status()).activity != ActivityState.AWAKE

    async def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Pause all replicas, and give the memory of their weights and KV caches back to the system.

        Requests that are kept compute the contents of the KV cache again later. New requests are refused.

        Args:
            level: as for `LLM.sleep`.
            mode: as for `pause_generation`.

        Raises:
            ConfigError: there is no such mode or level, or the replicas share experts with some at other addresses.
        """
        await self.operate(Operation("sleep", mode=mode, level=level))

    async def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take the memory again: all of it, or the parts in `tags` ("weights", "kv_cache").

        With all parts taken, the replicas run, even if they were paused before they fell asleep.

        Raises:
            UserError: the files of the weights have changed, and the replicas are still asleep; or there is no such
                part.
        """
        await self.operate(Operation("wake_up", tags=None if tags is None else tuple(tags)))

    async def is_sleeping(self) -> bool:
        return (await self.status()).activity == ActivityState.ASLEEP

    async def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Empty the prefix caches of all replicas. Return True.

        Args:
            reset_running_requests: have running requests compute their blocks again, too.
            reset_connector: has no effect, as there is no connector to another cache.
        """
        await self.operate(Operation("reset_prefix_cache", running=reset_running_requests))
        return True
