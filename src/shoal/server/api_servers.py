"""Several processes that answer HTTP requests before one fleet: they share the listening socket."""

import asyncio
import socket
import time
from dataclasses import asdict

from shoal import wire
from shoal.cluster.supervisor import Restarts
from shoal.errors import EngineError
from shoal.frontend.async_llm import AsyncLLM
from shoal.frontend.model import OpenModel
from shoal.observe.logging import get_logger
from shoal.server.listening import Listening
from shoal.server.settings import ServerSettings
from shoal.transport.process import ChildProcess, end_all

log = get_logger("serve")

_LOOK_S = 0.2
_MOST_RESTARTS = 100
_END_S = 8.0  # for clients to read what is left
_USEFUL_S = 10.0  # a life of that length was of use


class ApiServers:
    """Starts them, and starts one again that ends. A connection belongs to the process that has accepted it, and ends
    with it; the fleet's requests of that process end too, nobody else's."""

    def __init__(
        self,
        llm: AsyncLLM,
        model: OpenModel,
        settings: ServerSettings,
        listening: Listening,
        sock: socket.socket,
        count: int,
    ) -> None:
        assert llm.desk is not None
        self._desk = llm.desk
        self._setup = wire.ApiSetup(model.options.model, dict(model.given), asdict(settings), asdict(listening))
        self._socket = sock
        self._count = count
        self._children: dict[int, ChildProcess] = {}
        self._since: dict[int, float] = {}
        self._restarts = [Restarts(_MOST_RESTARTS) for _ in range(count)]
        self._stopping = False
        self._at_once = False

    async def serve(self) -> None:
        """
        Raises:
            EngineError: one ends again and again.
        """
        try:
            for number in range(self._count):
                self._start(number)
            while not self._stopping:
                await asyncio.sleep(_LOOK_S)
                for number, child in list(self._children.items()):
                    if not self._stopping and child.wait(0):
                        await self._revive(number, child)
        finally:
            await asyncio.to_thread(self._end)

    def stop(self, *, at_once: bool) -> None:
        self._stopping = True
        self._at_once = self._at_once or at_once

    def _start(self, number: int) -> None:
        child = ChildProcess("shoal.server.api_process", passed=[self._socket.fileno()])
        setup = wire.replace(self._setup, number=number, socket=self._socket.fileno())
        self._children[number] = child
        self._since[number] = time.monotonic()
        child.channel.send(wire.encode(setup))
        self._desk.connect(child.channel)

    async def _revive(self, number: int, child: ChildProcess) -> None:
        now = time.monotonic()
        pause = self._restarts[number].pause(now, useful=now - self._since[number] > _USEFUL_S)
        if pause is None:
            raise EngineError(f"API server {number} (process {child.pid}) {child.death()}, again and again")
        log.warning("API server %d (process %d) %s; it is started again", number, child.pid, child.death())
        await asyncio.sleep(pause)
        if not self._stopping:
            self._start(number)

    def _end(self) -> None:
        end_all(list(self._children.values()), wire.encode(wire.Stop()), 0.0 if self._at_once else _END_S)
