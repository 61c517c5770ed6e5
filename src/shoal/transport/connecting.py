"""Connecting to a rendezvous: both sides prove who they are, and the rendezvous admits or refuses this process."""

import contextlib
import hmac
import secrets
import select
import socket
import ssl
import time
from collections.abc import Callable, Mapping

from shoal import addresses
from shoal.addresses import Address
from shoal.errors import ConfigError, EngineError
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.rendezvous import REPORT_S, enable_keepalive, proof, require_key, this_process
from shoal.transport.tls import NotTls, TlsSocket, client_socket, explain
from shoal.wire.base import WireError, encode
from shoal.wire.credentials import Credentials, TlsFiles
from shoal.wire.rendezvous import (
    Challenge,
    FromRendezvous,
    Hello,
    JoinRefused,
    Knock,
    Signed,
    Welcome,
    from_rendezvous,
)

log = get_logger("rendezvous")

_RETRY_S = 0.2
_REPORT_RETURNING_S = 60.0  # how often a process that returns logs what it waits for
_ATTEMPT_S = 2.0
_ENDED = (ssl.SSLEOFError, ssl.SSLZeroReturnError)  # the other side has closed the connection
REFUSED_TIMEOUT_S = 15.0  # the wait for an unreachable member with the same rank to be removed


class _ConnectionEnded(Exception):
    """The other side ended the connection before it accepted or refused."""


class _NoAnswer(Exception):
    """The other side accepted the connection but sends nothing."""


class _FilesUnusable(Exception):
    """The files for TLS cannot be used now. Somebody may be replacing them."""


class _RefusedForNow(Exception):
    pass


def connect(
    address: Address,
    credentials: Credentials,
    *,
    room: str = "",
    rank: int = 0,
    size: int = 0,
    agreement: Mapping[str, str] | None = None,
    report: bytes = b"",
    timeout: float,
    returning: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
) -> Channel:
    """Connect to a rendezvous, and return the connection after both sides have proved that they know the key.

    If the credentials name files for TLS, both sides have also shown their certificates.

    The rendezvous may open later than this call, or may be so busy that it closes the connection: this is tried again.

    Args:
        room: the name of a room or of a door.
        size: of the room; 0 to join none.
        returning: this process has joined before, so its address and rank are right.
        cancelled: is asked before each attempt whether to give up.

    Raises:
        ConfigError: the rendezvous refuses this process, and says why; or it cannot be reached in time.
        EngineError: with `returning`, the rendezvous cannot be reached in time, or does not admit this process in time;
            or the attempts were cancelled.
    """
    require_key(credentials.key, address.host)
    host, pid = this_process()
    hello = Hello(room, rank, size, host, pid, secrets.token_bytes(32), dict(agreement or {}), report)
    begun = time.monotonic()
    last_report = begun
    refused_since: float | None = None
    timeout_error = EngineError if returning else ConfigError
    while True:
        left = timeout - (time.monotonic() - begun)
        if cancelled():
            raise EngineError(f"gave up waiting for {address}")
        try:
            sock = addresses.connect(address, max(min(left, _ATTEMPT_S), 0.01))
            left = max(timeout - (time.monotonic() - begun), _ATTEMPT_S)
            return _authenticated(sock, hello, address, credentials, left)
        except OSError as error:
            why = error.strerror or str(error)
            final = (
                f"no answer from {address} within {timeout:g} s ({why}), and no process has joined: start rank 0 "
                "there, or give the address and port at which it listens"
            )
            refused_since = None
        except _NoAnswer:
            why = "it does not answer"
            final = f"{address} did not answer in time: is another program there?"
            refused_since = None
        except _ConnectionEnded:
            refused_since = None
            why = "it closes the connection"
            final = f"{address} closed every connection for {timeout:g} s: is another program there?"
        except _FilesUnusable as error:
            refused_since = None
            why = final = f"the files of --cluster-tls can't be used: {error}"
        except _RefusedForNow as error:
            refused_since = time.monotonic() if refused_since is None else refused_since
            why = final = str(error)
            if time.monotonic() - refused_since > REFUSED_TIMEOUT_S and not returning:
                raise ConfigError(final) from None
        if time.monotonic() - begun + _RETRY_S >= timeout:
            raise timeout_error(final)
        if time.monotonic() - last_report >= (_REPORT_RETURNING_S if returning else REPORT_S):
            last_report = time.monotonic()
            log.info("waiting for %s (%s), %.0f s of %g", address, why, last_report - begun, timeout)
        time.sleep(_RETRY_S)


def _authenticated(
    sock: socket.socket, hello: Hello, address: Address, credentials: Credentials, timeout: float
) -> Channel:
    """Return a channel on this socket after authentication. If that fails, the socket is closed."""
    deadline = time.monotonic() + timeout
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    enable_keepalive(sock)
    if credentials.tls is None:
        channel = Channel(sock)
    else:
        channel = Channel(_encrypted(sock, credentials.tls, address, deadline))
    try:
        _authenticate(channel, hello, address, credentials.key, deadline, encrypted=credentials.tls is not None)
    except BaseException:
        channel.close()
        raise
    return channel


def _encrypted(sock: socket.socket, files: TlsFiles, address: Address, deadline: float) -> TlsSocket:
    """Return the connection with TLS, after its handshake. If that fails, the socket is closed."""
    try:
        connection = client_socket(sock, files)
    except OSError as error:
        sock.close()
        raise _FilesUnusable(str(error)) from None
    try:
        while not connection.shake_hands():
            poller = select.poll()
            poller.register(connection.fileno(), select.POLLIN)
            if not poller.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise _NoAnswer
    except BaseException as error:
        connection.close()
        if isinstance(error, NotTls):
            raise ConfigError(f"{address} does not use TLS: give --cluster-tls to all hosts, or to none") from None
        if isinstance(error, ssl.SSLError) and not isinstance(error, _ENDED):
            raise ConfigError(f"{address} can't be joined: {explain(error)}") from None
        if isinstance(error, OSError):
            raise _ConnectionEnded from None
        raise
    return connection


def _authenticate(
    channel: Channel, hello: Hello, address: Address, key: str, deadline: float, *, encrypted: bool
) -> None:
    encoded = encode(hello)
    if not encrypted:
        with contextlib.suppress(ChannelClosed):  # `_receive` will notice it
            channel.send(encode(Knock()))
    while True:
        for message in _receive(channel, deadline, address):
            match message:
                case Challenge():
                    with contextlib.suppress(ChannelClosed):  # `_receive` will notice it
                        channel.send(encode(Signed(encoded, proof(key, "member", message.nonce, encoded))))
                case Welcome():
                    if not hmac.compare_digest(message.proof, proof(key, "rendezvous", hello.nonce, encoded)):
                        raise ConfigError(f"{address} does not know the shared key: is another program there?")
                    return
                case JoinRefused():
                    why = f"rank {hello.rank} may not join at {address}: {message.why}"
                    raise _RefusedForNow(why) if message.again else ConfigError(why)


def _receive(channel: Channel, deadline: float, address: Address) -> list[FromRendezvous]:
    """Return one message at most, so that messages after a Welcome are left for the owner of the channel."""
    left = deadline - time.monotonic()
    if left <= 0 or (not channel.has_frame and not wait([channel], left)):
        raise _NoAnswer
    try:
        return [from_rendezvous.decode(frame) for frame in channel.receive(1)]
    except ChannelClosed as ended:
        cause = ended.__cause__
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, _ENDED):  # it has checked our certificate last
            raise ConfigError(f"{address} can't be joined: {explain(cause)}") from None
        raise _ConnectionEnded from None
    except WireError:
        raise ConfigError(f"{address} uses another protocol: is another program there?") from None
