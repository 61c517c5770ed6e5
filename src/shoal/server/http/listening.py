"""Listening sockets, and uvicorn run as a part of a larger program: with our log, and without its signal handlers."""

import asyncio
import contextlib
import errno
import logging
import math
import socket
import ssl
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from shoal import addresses
from shoal.errors import AddressInUse, ConfigError
from shoal.process.malloc import return_large_blocks
from shoal.server.http.limits import RequestLimits
from shoal.server.http.protocol import protocol_with
from shoal.server.settings import ServerSettings

_BACKLOG = 2048
_SWITCH_S = 0.001  # a busy thread keeps the event loop waiting no longer; Python's default is 0.005
_GOODBYE_S = 1.0  # for clients to answer the end of a connection
_LOOK_S = 0.1  # how often it is checked whether clients have read everything
LAST_BYTES_S = 5.0  # clients have at least so long to read the rest of answers that are complete


@dataclass(frozen=True, slots=True)
class Listening:
    """Address, TLS and log level of the HTTP server. `log_level` is the one of uvicorn."""

    host: str = "127.0.0.1"
    port: int = 8000
    log_level: str = "warning"
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None

    def check(self) -> None:
        """Check that the certificate can be used.

        Raises:
            ConfigError: it can't.
        """
        if self.ssl_keyfile and not self.ssl_certfile:
            raise ConfigError("--ssl-keyfile needs --ssl-certfile")
        if self.ssl_certfile:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self.ssl_certfile, self.ssl_keyfile)
            except (OSError, ssl.SSLError) as error:
                names = " and ".join(filter(None, (self.ssl_certfile, self.ssl_keyfile)))
                raise ConfigError(f"{names} can't be used for TLS: {error}") from None

    def bind(self) -> list[socket.socket]:
        """Return listening sockets, one for each address of the host, all with the same port.

        Raises:
            AddressInUse: another process listens there.
            ConfigError: this host can't listen there.
        """
        host = addresses.parse_host(self.host, "--host") if self.host else ""
        try:
            found = addresses.listen(host, self.port, _BACKLOG)
        except socket.gaierror as error:
            raise ConfigError(f"--host {self.host} is no address of this host: {error.strerror}") from None
        except OSError as error:
            taken = error.errno == errno.EADDRINUSE
            hint = "choose another --port, or 0 for a free one" if taken else "choose another --host or --port"
            kind_of_error = AddressInUse if taken else ConfigError
            raise kind_of_error(
                f"can't listen on {addresses.join_host_port(host, self.port)} ({error.strerror}): {hint}"
            ) from None
        for sock in found:
            sock.setblocking(False)
        return found

    def url(self, sockets: Sequence[socket.socket]) -> str:
        """Return the URL by which a client on this host reaches the server."""
        host, port = sockets[0].getsockname()[:2]
        reached = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
        return f"{'https' if self.ssl_certfile else 'http'}://{addresses.join_host_port(reached, port)}"


class Server(uvicorn.Server):
    """A uvicorn server that handles no signals: `stop` ends it."""

    complete = True  # after the end: True if all answers were given and read

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def stop(self, patience: float | None) -> None:
        """End the server. Clients have `patience` seconds to read what is left, with None as long as they need; 0 ends
        it at once, even if `stop` was called before."""
        self.config.timeout_graceful_shutdown = None if patience is None else math.ceil(patience)
        self.force_exit = patience == 0
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        watching = asyncio.create_task(self._leave_when_read())
        await super().shutdown(sockets)
        watching.cancel()
        self.complete = not self._unread

    async def _leave_when_read(self) -> None:
        """Stop waiting for connections on which nothing is left to read: a sleeping client never answers the end of
        TLS."""
        since = time.monotonic()
        while time.monotonic() - since < _GOODBYE_S:
            await asyncio.sleep(_LOOK_S)
            if self._unread:
                since = time.monotonic()
        self.force_exit = True

    @property
    def _unread(self) -> bool:
        """True if some answer was not given or read to its end."""
        return any(_owes(cast(HttpToolsProtocol, each)) for each in self.server_state.connections)


def _owes(connection: HttpToolsProtocol) -> bool:
    cycle = connection.cycle
    answering = cycle is not None and not cycle.response_complete
    return answering or bool(connection.pipeline) or connection.transport.get_write_buffer_size() > 0


def make_server(app: FastAPI, settings: ServerSettings, listening: Listening) -> Server:
    _log_like_ours(listening.log_level)
    sys.setswitchinterval(_SWITCH_S)
    return_large_blocks()
    return Server(
        uvicorn.Config(
            app,
            http=protocol_with(RequestLimits()),
            loop="uvloop",
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=listening.log_level in ("trace", "debug", "info"),
            root_path=settings.root_path,
            ssl_keyfile=listening.ssl_keyfile,
            ssl_certfile=listening.ssl_certfile,
        )
    )


def _log_like_ours(level: str) -> None:
    found = logging.getLogger("uvicorn")
    found.handlers[:] = logging.getLogger("shoal").handlers
    found.setLevel("DEBUG" if level == "trace" else level.upper())
    found.propagate = False
