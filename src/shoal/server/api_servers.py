"""Several processes that answer HTTP requests before one fleet: they share the listening sockets."""

import asyncio
import contextlib
import hashlib
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from shoal.cluster.members.restarts import Restarts
from shoal.errors import ClosedError, EngineError
from shoal.launch.open_model import OpenModel
from shoal.llm.async_llm import AsyncLLM
from shoal.log import get_logger
from shoal.server.http.listening import LAST_BYTES_S, Listening
from shoal.server.settings import ServerSettings
from shoal.transport.channel import ChannelClosed
from shoal.transport.process import ChildProcess
from shoal.wire.base import Stop, encode, replace_fields
from shoal.wire.plan import ApiSetup

log = get_logger("serve")

_LOOK_S = 0.2
_SLICE_S = 0.05  # of the wait for their end
_MOST_RESTARTS = 100
_USEFUL_S = 10.0  # a life of that length was of use
_STUCK_S = 3.0  # stopped, or without a line to the fleet
_SEED_BYTES = 7  # of it; the options take no more than 63 bits


@dataclass(slots=True)
class _Slot:
    """One number's process, through all its lives."""

    number: int
    restarts: Restarts
    child: ChildProcess | None = None
    lives: int = 0
    since: float = 0.0  # when this life began
    next_start: float = 0.0
    stuck_since: float | None = None


class ApiServers:
    """Starts them, and starts one again that ends, or that stands still and is killed. A connection belongs to the
    process that has accepted it, and ends with it; the fleet's requests of that process end too, nobody else's."""

    def __init__(
        self,
        llm: AsyncLLM,
        model: OpenModel,
        settings: ServerSettings,
        listening: Listening,
        sockets: Sequence[socket.socket],
        count: int,
        on_restart: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_restart` is called on the thread of the `llm`'s desk."""
        assert llm.desk is not None
        self._llm = llm
        self._desk = llm.desk
        self._given = dict(model.given)
        self._setup = ApiSetup(model.options.model, self._given, asdict(settings), asdict(listening), model.served)
        self._sockets = sockets
        self._slots = [_Slot(number, Restarts(_MOST_RESTARTS)) for number in range(count)]
        self._on_restart = on_restart
        self._ends_at: float | None = None  # what still runs then is killed

    async def serve(self) -> bool:
        """Until `stop`. True: all clients have read what was there for them.

        Raises:
            EngineError: one ends again and again, or the fleet's thread has ended.
        """
        try:
            while self._ends_at is None:
                for slot in self._slots:
                    await self._look_after(slot)
                await asyncio.sleep(_LOOK_S)
        finally:
            if self._ends_at is None:
                self.stop(LAST_BYTES_S)
            complete = await asyncio.to_thread(self._end)
        return complete

    def stop(self, patience: float) -> None:
        """Ends `serve`: clients have so many seconds to read what is left. May be called again, with fewer."""
        ends_at = time.monotonic() + patience
        self._ends_at = ends_at if self._ends_at is None else min(ends_at, self._ends_at)

    async def _look_after(self, slot: _Slot) -> None:
        now = time.monotonic()
        if slot.child is None:
            if slot.next_start <= now:
                await self._start(slot)
        elif slot.child.wait(0):
            self._note_end(slot, slot.child, now)
        elif self._is_stuck(slot, slot.child, now):
            what = "was stopped (SIGSTOP or a debugger)" if slot.child.stopped() else "has lost its line to the engine"
            log.warning("API server %d (process %d) %s, and is killed", slot.number, slot.child.pid, what)
            await asyncio.to_thread(slot.child.kill_process)

    def _is_stuck(self, slot: _Slot, child: ChildProcess, now: float) -> bool:
        if not child.stopped() and child.channel.fileno() >= 0:
            slot.stuck_since = None
        elif slot.stuck_since is None:
            slot.stuck_since = now
        return slot.stuck_since is not None and now - slot.stuck_since > _STUCK_S

    def _note_end(self, slot: _Slot, child: ChildProcess, now: float) -> None:
        pause = slot.restarts.pause(now, useful=now - slot.since > _USEFUL_S)
        if pause is None:
            raise EngineError(f"API server {slot.number} (process {child.pid}) {child.death()}, again and again")
        log.warning("API server %d (process %d) %s; it is started again", slot.number, child.pid, child.death())
        slot.child = None
        slot.next_start = now + pause

    async def _start(self, slot: _Slot) -> None:
        """The channel belongs to the desk from now on, which closes it."""
        setup = self._setup_of(slot)
        passed = [sock.fileno() for sock in self._sockets]
        child = slot.child = await asyncio.to_thread(ChildProcess, "shoal.server.api_process", passed=passed)
        slot.since = time.monotonic()
        slot.stuck_since = None
        with contextlib.suppress(ChannelClosed):  # it has ended already, which is seen in turn
            child.channel.send(encode(setup))
        try:
            self._desk.connect(child.channel)
            if slot.lives:
                self._desk.do(self._on_restart)
        except ClosedError:
            child.channel.hang_up()
            raise
        slot.lives += 1

    def _setup_of(self, slot: _Slot) -> ApiSetup:
        options = self._given
        if "seed" in options:  # requests are numbered from 0 in each of them, and drawn by seed and number
            options = {**options, "seed": _seed_of(int(options["seed"]), slot.number, slot.lives)}
        return replace_fields(
            self._setup,
            options=options,
            served=replace_fields(self._setup.served, max_model_len=self._llm.max_model_len),
            number=slot.number,
            sockets=tuple(sock.fileno() for sock in self._sockets),
        )

    def _end(self) -> bool:
        running = [slot.child for slot in self._slots if slot.child is not None]
        with contextlib.suppress(ClosedError):  # then the desk has hung up, which ends them as well
            self._desk.do(lambda: _say_stop(running))
        for child in running:
            while not child.wait(_SLICE_S) and time.monotonic() < (self._ends_at or 0.0):
                pass
        for child in running:
            child.kill_process()
        return all(child.exit_code == 0 for child in running)


def _say_stop(children: Sequence[ChildProcess]) -> None:
    for child in children:
        child.say(encode(Stop()))


def _seed_of(seed: int, number: int, life: int) -> int:
    digest = hashlib.blake2b(f"{seed}:{number}:{life}".encode(), digest_size=_SEED_BYTES).digest()
    return int.from_bytes(digest, "little")
