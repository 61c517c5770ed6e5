"""Several API server processes in front of one fleet. They share the listening sockets."""

import asyncio
import contextlib
import hashlib
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from shoal.cluster.replicas.restart_budget import RestartBudget
from shoal.cluster.replicas.supervised import RunState, Supervised
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
_USEFUL_S = 10.0  # a run of that length was useful
_STUCK_S = 3.0  # stopped, or without a connection to the fleet
_SEED_BYTES = 7  # of it; the options take no more than 63 bits


@dataclass(slots=True, kw_only=True)
class ApiServer(Supervised):
    """The API server with this number, across its restarts."""

    number: int
    child: ChildProcess | None = None
    stuck_since: float | None = None


class ApiServers:
    """A supervisor of API servers: it restarts one that has ended, and kills and restarts one that hangs.

    A connection belongs to the process that has accepted it, and ends with it. The requests of that process in the
    fleet end too, and no others.
    """

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
        """`on_restart` is called on the thread of the `llm`'s fleet."""
        assert llm.fleet_server is not None
        self._llm = llm
        self._fleet_server = llm.fleet_server
        self._given = dict(model.given)
        self._setup = ApiSetup(model.options.model, self._given, asdict(settings), asdict(listening), model.served)
        self._sockets = sockets
        self.servers = [
            ApiServer(number=number, restarts=RestartBudget(_MOST_RESTARTS), useful_s=_USEFUL_S)
            for number in range(count)
        ]
        self._on_restart = on_restart
        self._ends_at: float | None = None  # what still runs then is killed

    async def serve(self) -> bool:
        """Run all API servers until `stop`. Return True if every client has read its answer to the end.

        Raises:
            EngineError: one ends again and again, or the fleet's thread has ended.
        """
        try:
            while self._ends_at is None:
                for server in self.servers:
                    await self._look_after(server)
                await asyncio.sleep(_LOOK_S)
        finally:
            if self._ends_at is None:
                self.stop(LAST_BYTES_S)
            complete = await asyncio.to_thread(self._end)
        return complete

    def stop(self, patience: float) -> None:
        """End `serve`. Clients have `patience` seconds to read what is left. May be called again, with fewer."""
        ends_at = time.monotonic() + patience
        self._ends_at = ends_at if self._ends_at is None else min(ends_at, self._ends_at)

    async def _look_after(self, server: ApiServer) -> None:
        now = time.monotonic()
        if server.is_due(now):
            await self._start(server)
        elif server.child is None:
            return
        elif server.child.wait(0):
            self._note_end(server, server.child, now)
        elif self._is_stuck(server, server.child, now):
            what = "was stopped (SIGSTOP or a debugger)" if server.child.stopped() else "has lost its connection"
            log.warning("API server %d (process %d) %s, and is killed", server.number, server.child.pid, what)
            await asyncio.to_thread(server.child.kill_process)

    def _is_stuck(self, server: ApiServer, child: ChildProcess, now: float) -> bool:
        if not child.stopped() and child.channel.fileno() >= 0:
            server.stuck_since = None
        elif server.stuck_since is None:
            server.stuck_since = now
        return server.stuck_since is not None and now - server.stuck_since > _STUCK_S

    def _note_end(self, server: ApiServer, child: ChildProcess, now: float) -> None:
        error = EngineError(f"API server {server.number} (process {child.pid}) {child.describe_exit()}")
        server.child = None
        server.ended(error, now, useful=server.was_useful(now, worked=False))
        if server.state is RunState.FAILED:
            raise EngineError(f"{error}; it {server.outlook}")
        log.warning("%s; it %s", error, server.outlook)

    async def _start(self, server: ApiServer) -> None:
        """Start an API server. From then on its channel belongs to the fleet server, which closes it."""
        setup = self._setup_of(server)
        passed = [sock.fileno() for sock in self._sockets]
        child = server.child = await asyncio.to_thread(ChildProcess, "shoal.server.api_process", passed=passed)
        now = time.monotonic()
        server.started(now)
        server.became_ready(now)  # the other API servers answer while it starts
        server.stuck_since = None
        with contextlib.suppress(ChannelClosed):  # it has ended already, which is seen in turn
            child.channel.send(encode(setup))
        try:
            self._fleet_server.connect(child.channel)
            if server.num_restarts:
                self._fleet_server.do(self._on_restart)
        except ClosedError:
            child.channel.shut_down()
            raise

    def _setup_of(self, server: ApiServer) -> ApiSetup:
        options = self._given
        if "seed" in options:  # requests are numbered from 0 in each of them, and drawn by seed and number
            options = {**options, "seed": seed_of(int(options["seed"]), server.number, server.starts)}
        return replace_fields(
            self._setup,
            options=options,
            served=replace_fields(self._setup.served, max_model_len=self._llm.max_model_len),
            number=server.number,
            sockets=tuple(sock.fileno() for sock in self._sockets),
        )

    def _end(self) -> bool:
        running = [server.child for server in self.servers if server.child is not None]
        with contextlib.suppress(ClosedError):  # the fleet server has ended, and closed their connections
            self._fleet_server.do(lambda: _say_stop(running))
        for child in running:
            while not child.wait(_SLICE_S) and time.monotonic() < (self._ends_at or 0.0):
                pass
        for child in running:
            child.kill_process()
        return all(child.exit_code == 0 for child in running)


def _say_stop(children: Sequence[ChildProcess]) -> None:
    for child in children:
        child.say(encode(Stop()))


def seed_of(seed: int, number: int, start: int) -> int:
    """Return the seed of one start of the API server with this number, where the user has given `seed`."""
    digest = hashlib.blake2b(f"{seed}:{number}:{start}".encode(), digest_size=_SEED_BYTES).digest()
    return int.from_bytes(digest, "little")
