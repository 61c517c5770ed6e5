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
from shoal.errors import ConfigError, EngineError, ShoalError
from shoal.log import get_logger
from shoal.transport.channel import Channel, ChannelClosed, FrameTooLong, wait
from shoal.transport.rendezvous import REPORT_S, enable_keepalive, proof, require_key, this_process
from shoal.transport.tls import NotTls, TlsSocket, client_socket, explain
from shoal.wire.base import WireError, encode, replace_fields
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
ANSWER_S = 10.0
_MAX_ANSWER_BYTES = 1 << 20  # a longer answer is that of another program
REFUSED_TIMEOUT_S = 15.0  # the wait for an unreachable member with the same rank to be removed
SILENT_TIMEOUT_S = 60.0  # a rendezvous that is busy answers earlier


class Refused(ConfigError):
    """The rendezvous knows which process this is, and refuses it."""


class RefusedUnknown(ConfigError):
    """Both sides do not agree on TLS, so the rendezvous does not know which process it has refused."""


class _Obstacle(Exception):
    """A reason why an attempt has failed, which may be gone soon.

    Args:
        why: for the log.
        final: the message of the error if it does not go away.
        patience_s: for how long the attempts go on with no other kind of obstacle in between.
    """

    def __init__(self, why: str, final: str, patience_s: float = float("inf")) -> None:
        super().__init__(why)
        self.why = why
        self.final = final
        self.patience_s = patience_s


class _ConnectionEnded(_Obstacle):
    """The other side ended the connection before it accepted or refused."""


class _NoAnswer(_Obstacle):
    """The other side accepted the connection but sends nothing."""


class _FilesUnusable(_Obstacle):
    """The files for TLS cannot be used now. Somebody may be replacing them."""


class _RefusedForNow(_Obstacle):
    """The other side refused this process, and may accept it later."""


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
        Refused, RefusedUnknown: the rendezvous refuses this process; the message says why.
        ConfigError: it cannot be reached in time, or another program is there.
        EngineError: with `returning`, the rendezvous cannot be reached in time, or does not admit this process in time;
            or the attempts were cancelled.
    """
    host, pid = this_process()
    hello = Hello(room, rank, size, host, pid, secrets.token_bytes(32), dict(agreement or {}), report)
    return _connect(address, credentials, hello, timeout, returning=returning, cancelled=cancelled)


def report_failure(
    address: Address, credentials: Credentials, *, room: str, rank: int, size: int, why: str, timeout: float
) -> bool:
    """Tell the owner of a door why this process cannot join. Never raises.

    The reason is encrypted if this host has TLS. If both sides do not agree on TLS, they learn only this, in the clear.
    The key proves who says so.

    Args:
        room: the name of the door.
        timeout: how long to try, as the rendezvous may open later.

    Returns:
        Whether the owner of the door knows the reason now.
    """
    deadline = time.monotonic() + timeout
    (host, pid), nonce = this_process(), secrets.token_bytes(32)
    hello = Hello(room, rank, size, host, pid, nonce, {}, failure=why)
    try:
        return _is_told(address, credentials, hello, timeout)
    except RefusedUnknown as error:
        in_clear = replace_fields(hello, failure=str(error))
    with contextlib.suppress(RefusedUnknown):
        left = max(deadline - time.monotonic(), _ATTEMPT_S)
        return _is_told(address, Credentials(credentials.key), in_clear, left)
    return False


def _is_told(address: Address, credentials: Credentials, hello: Hello, timeout: float) -> bool:
    """Send an introduction that says why this process cannot join. Return whether the answer has come."""
    try:
        _connect(address, credentials, hello, timeout).close()
    except Refused:
        return True
    except RefusedUnknown:
        raise
    except ShoalError:  # nobody has answered in this time; the process ends with its own error all the same
        return False
    return False


def _connect(
    address: Address,
    credentials: Credentials,
    hello: Hello,
    timeout: float,
    *,
    returning: bool = False,
    cancelled: Callable[[], bool] = lambda: False,
) -> Channel:
    """Connect to a rendezvous with this introduction. Arguments and errors are those of `connect`."""
    require_key(credentials.key, address.host)
    begun = last_report = since = time.monotonic()
    former: type[_Obstacle] | None = None
    while True:
        if cancelled():
            raise EngineError(f"gave up waiting for {address}")
        try:
            return _attempt(address, credentials, hello, timeout - (time.monotonic() - begun))
        except OSError as error:
            why = error.strerror or str(error)
            final = (
                f"no answer from {address} within {timeout:g} s ({why}), and no process has joined: start rank 0 "
                "there, or give the address and port at which it listens"
            )
            former = None
        except _Obstacle as obstacle:
            why, final = obstacle.why, obstacle.final
            if former is not type(obstacle):
                former, since = type(obstacle), time.monotonic()
            if time.monotonic() - since > obstacle.patience_s and not returning:
                raise ConfigError(final) from None
        if time.monotonic() - begun + _RETRY_S >= timeout:
            raise (EngineError if returning else ConfigError)(final)
        if time.monotonic() - last_report >= (_REPORT_RETURNING_S if returning else REPORT_S):
            last_report = time.monotonic()
            log.info("waiting for %s (%s), %.0f s of %g", address, why, last_report - begun, timeout)
        time.sleep(_RETRY_S)


def _attempt(address: Address, credentials: Credentials, hello: Hello, timeout: float) -> Channel:
    sock = addresses.connect(address, max(min(timeout, _ATTEMPT_S), 0.01))
    return _authenticated(sock, hello, address, credentials, max(min(timeout, ANSWER_S), _ATTEMPT_S))


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
    afterwards, channel.max_frame_bytes = channel.max_frame_bytes, _MAX_ANSWER_BYTES
    try:
        _authenticate(channel, hello, address, credentials.key, deadline, encrypted=credentials.tls is not None)
    except BaseException:
        channel.close()
        raise
    channel.max_frame_bytes = afterwards
    return channel


def _encrypted(sock: socket.socket, files: TlsFiles, address: Address, deadline: float) -> TlsSocket:
    """Return the connection with TLS, after its handshake. If that fails, the socket is closed."""
    try:
        connection = client_socket(sock, files)
    except OSError as error:
        sock.close()
        why = f"the files of --cluster-tls can't be used: {error}"
        raise _FilesUnusable(why, why) from None
    try:
        while not connection.shake_hands():
            poller = select.poll()
            poller.register(connection.fileno(), select.POLLIN)
            if not poller.poll(max(deadline - time.monotonic(), 0) * 1000):
                raise _no_answer(address)
    except BaseException as error:
        connection.close()
        if isinstance(error, NotTls):
            raise RefusedUnknown(f"{address} does not use TLS: give --cluster-tls to all hosts, or to none") from None
        if isinstance(error, ssl.SSLError) and not isinstance(error, _ENDED):
            raise RefusedUnknown(f"{address} can't be joined: {explain(error)}") from None
        if isinstance(error, OSError):
            raise _connection_ended(address) from None
        raise
    return connection


def _authenticate(
    channel: Channel, hello: Hello, address: Address, key: str, deadline: float, *, encrypted: bool
) -> None:
    encoded = encode(hello)
    signed = False
    if not encrypted:
        with contextlib.suppress(ChannelClosed):  # `_receive` will notice it
            channel.send(encode(Knock(only_to_report=bool(hello.failure))))
    while True:
        for message in _receive(channel, deadline, address):
            match message:
                case Challenge():
                    signed = True
                    with contextlib.suppress(ChannelClosed):  # `_receive` will notice it
                        channel.send(encode(Signed(encoded, proof(key, "member", message.nonce, encoded))))
                case Welcome():
                    if not hmac.compare_digest(message.proof, proof(key, "rendezvous", hello.nonce, encoded)):
                        raise ConfigError(f"{address} does not know the shared key: is another program there?")
                    return
                case JoinRefused():
                    why = f"rank {hello.rank} may not join at {address}: {message.why}"
                    if message.again:
                        raise _RefusedForNow(why, why, REFUSED_TIMEOUT_S)
                    raise Refused(why) if signed else RefusedUnknown(why)


def _receive(channel: Channel, deadline: float, address: Address) -> list[FromRendezvous]:
    """Return one message at most, so that messages after a Welcome are left for the owner of the channel."""
    left = deadline - time.monotonic()
    if left <= 0 or (not channel.has_frame and not wait([channel], left)):
        raise _no_answer(address)
    try:
        return [from_rendezvous.decode(frame) for frame in channel.receive(1)]
    except ChannelClosed as ended:
        cause = ended.__cause__
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, _ENDED):  # it has checked our certificate last
            raise RefusedUnknown(f"{address} can't be joined: {explain(cause)}") from None
        if isinstance(ended, FrameTooLong):
            raise ConfigError(f"{address} uses another protocol: is another program there?") from None
        raise _connection_ended(address) from None
    except WireError:
        raise ConfigError(f"{address} uses another protocol: is another program there?") from None


def _no_answer(address: Address) -> _NoAnswer:
    final = f"{address} did not answer in time: is another program there?"
    return _NoAnswer("it does not answer", final, SILENT_TIMEOUT_S)


def _connection_ended(address: Address) -> _ConnectionEnded:
    return _ConnectionEnded("it closes the connection", f"{address} closes every connection: is another program there?")
