"""TLS for the connections between hosts: version 1.3, with certificates of one CA on both sides.

The CA belongs to the cluster and signs nothing else, so every certificate of it is welcome. Names in certificates are
not compared, since the addresses of hosts change.
"""

import functools
import os
import socket
import ssl
import stat
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from shoal.errors import ConfigError
from shoal.wire.credentials import TlsFiles

_RECORD_BYTES = 1 << 14  # the most bytes that a TLS record has
_TLS_RECORDS = (b"\x15", b"\x16")  # the first byte of a TLS connection: of an alert, or of the handshake
_CLIENT_HELLO = b"\x16\x03"  # the first bytes of a process that uses TLS
_MAX_UNREAD = 1 << 16
_NOT_YET_VALID, _EXPIRED = 9, 10  # codes of OpenSSL (X509_V_ERR_*)
_SAME_CA = "give all hosts certificates of one CA, as `shoal cluster-keys` makes them"
_REASONS = {
    "TLSV1_ALERT_UNKNOWN_CA": f"it does not accept the certificate of this host, which has another CA: {_SAME_CA}",
    "TLSV1_ALERT_DECRYPT_ERROR": f"it does not accept the certificate of this host, which has another CA: {_SAME_CA}",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": "it does not accept the certificate of this host, which has expired there: "
    "compare the clocks, or make new certificates with `shoal cluster-keys`",
    "SSLV3_ALERT_BAD_CERTIFICATE": f"it does not accept the certificate of this host: {_SAME_CA}",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "it needs a certificate: give --cluster-tls",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": f"it has no certificate: {_SAME_CA}",
    "TLSV1_ALERT_PROTOCOL_VERSION": "it does not use TLS 1.3: is another program there?",
    "UNSUPPORTED_PROTOCOL": "it does not use TLS 1.3: is another program there?",
}


class NotTls(OSError):
    """The other side of a connection does not use TLS."""


def starts_tls(data: bytes | bytearray) -> bool:
    """Tell whether these are the first bytes of a process that uses TLS."""
    return data[: len(_CLIENT_HELLO)] == _CLIENT_HELLO


def explain(error: ssl.SSLError) -> str:
    """Return why a connection has failed, as seen from this side, and the way out. "it" is the other side."""
    if isinstance(error, ssl.SSLCertVerificationError):
        if error.verify_code == _EXPIRED:
            return "its certificate has expired: make new ones with `shoal cluster-keys`"
        if error.verify_code == _NOT_YET_VALID:
            return "its certificate is not valid yet: compare the clocks of the hosts"
        return f"its certificate has another CA ({error.verify_message}): {_SAME_CA}"
    reason = str(error.reason or error)
    return _REASONS.get(reason, f"TLS has failed: {reason.lower().replace('_', ' ')}")


class TlsSocket:
    """A TLS connection, with the methods of a non-blocking socket that a `Channel` uses.

    The handshake is part of the first calls of `recv` and `send`. Several threads may call these: there is a lock,
    since OpenSSL allows only one at a time.
    """

    def __init__(self, sock: socket.socket, context: ssl.SSLContext, *, server_side: bool) -> None:
        """Take over a connected socket.

        Raises:
            OSError: the connection has ended already.
        """
        sock.setblocking(False)
        self._ssl = context.wrap_socket(sock, server_side=server_side, do_handshake_on_connect=False)
        self._lock = threading.Lock()
        self._checked = False  # whether the first byte of the other side was seen

    def setblocking(self, _: bool) -> None:
        """Do nothing: this socket never blocks."""

    def fileno(self) -> int:
        return self._ssl.fileno()

    def getsockname(self) -> Any:
        return self._ssl.getsockname()

    def getpeername(self) -> Any:
        return self._ssl.getpeername()

    def recv(self, size: int) -> bytes:
        """Return the bytes of the next record, or b"" at the end of the connection.

        No byte stays behind in a place where `poll` would not see it.

        Raises:
            BlockingIOError: there is no whole record yet.
            NotTls: the other side does not use TLS.
            ssl.SSLError: the handshake has failed, or a record was changed on its way.
            OSError: the connection has ended.
        """
        with self._lock:
            try:
                self._check_first_byte()
                data = self._ssl.recv(min(size, _RECORD_BYTES))
                while pending := self._ssl.pending():
                    data += self._ssl.recv(pending)
                return data
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise BlockingIOError from None

    def send(self, data: bytes | memoryview) -> int:
        """Send the first bytes, up to a record, and return their number.

        Raises:
            BlockingIOError: none can be sent now. The next call must begin with the same bytes.
            ssl.SSLError, OSError: as for `recv`.
        """
        with self._lock:
            try:
                return self._ssl.send(data)
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                raise BlockingIOError from None

    def shake_hands(self) -> bool:
        """Go on with the handshake of a client. Return whether it is complete on this side. Errors as for `recv`."""
        with self._lock:
            try:
                self._ssl.do_handshake()
            except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
                return False
            except ssl.SSLError as error:
                if error.reason == "WRONG_VERSION_NUMBER":
                    raise NotTls("it does not use TLS") from None
                raise
            self._checked = True
            return True

    def _check_first_byte(self) -> None:
        """Look at the first byte of the other side before OpenSSL takes it."""
        if self._checked:
            return
        first = socket.socket.recv(self._ssl, 1, socket.MSG_PEEK)
        if first and first not in _TLS_RECORDS:
            raise NotTls("it does not use TLS")
        self._checked = True

    @property
    def is_open(self) -> bool:
        """True after the handshake: both sides have accepted each other's certificate, as far as this side knows."""
        return self._ssl.version() is not None

    def drop_unread(self) -> None:
        """Drop the bytes that have arrived. Closing with unread bytes would destroy those that were sent last."""
        with suppress(OSError):
            while socket.socket.recv(self._ssl, _MAX_UNREAD):
                pass

    def without_tls(self) -> socket.socket:
        """Return the connection for use without TLS, after `NotTls`: no byte of it was read. This object is closed."""
        return socket.socket(fileno=self._ssl.detach())

    def shutdown(self, how: int) -> None:
        socket.socket.shutdown(self._ssl, how)  # that of SSLSocket would go on without TLS

    def close(self) -> None:
        self._ssl.close()


def server_socket(sock: socket.socket, files: TlsFiles) -> TlsSocket:
    """Return the TLS side of a connection that was accepted. Files that were renewed are read again.

    Raises:
        OSError: the connection has ended; or the files cannot be used any more.
    """
    return TlsSocket(sock, _context(ssl.PROTOCOL_TLS_SERVER, files), server_side=True)


def client_socket(sock: socket.socket, files: TlsFiles) -> TlsSocket:
    """Return the TLS side of a connection to a server, before the handshake. Errors are those of `server_socket`."""
    return TlsSocket(sock, _context(ssl.PROTOCOL_TLS_CLIENT, files), server_side=False)


def _context(protocol: int, files: TlsFiles) -> ssl.SSLContext:
    states = [os.stat(path) for path in (files.ca, files.certificate, files.key)]
    return _context_of(protocol, files, tuple((state.st_ino, state.st_mtime_ns) for state in states))


@functools.lru_cache(maxsize=8)
def _context_of(protocol: int, files: TlsFiles, _: tuple[tuple[int, int], ...]) -> ssl.SSLContext:
    """Return the settings of connections. They are made again when the files have changed: that takes a millisecond."""
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    if protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # connections are few and long, so none is resumed
    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.certificate, files.key, password="")  # "": do not ask the terminal
    return context


@dataclass(frozen=True, slots=True)
class CheckedFiles:
    """The outcome of a check of the files of a host."""

    expires: float  # when the certificate expires, in seconds since 1970

    @property
    def days_left(self) -> float:
        return (self.expires - time.time()) / 86400


def check_files(files: TlsFiles) -> CheckedFiles:
    """Check that a host can use its files in both directions: it makes a TLS connection with itself, in memory.

    Raises:
        ConfigError: a file is missing, may be read by others, does not fit the others, or has expired.
    """
    for path in (files.ca, files.certificate, files.key):
        _check_file(path, secret=path == files.key)
    try:
        return CheckedFiles(_meet_itself(files))
    except ssl.SSLCertVerificationError as error:
        what = f"{files.certificate} or its CA"
        if error.verify_code == _EXPIRED:
            raise ConfigError(f"{what} has expired: make new ones with `shoal cluster-keys`") from None
        if error.verify_code == _NOT_YET_VALID:
            raise ConfigError(f"{what} is not valid yet: check the clock of this host") from None
        raise ConfigError(
            f"{files.certificate} can't be used with the CA in {files.ca} ({error.verify_message}): copy both from one "
            "folder of `shoal cluster-keys`"
        ) from None
    except ssl.SSLError as error:
        why = str(error.reason or error).lower().replace("_", " ")
        raise ConfigError(
            f"{files.certificate} and {files.key} can't be used with {files.ca} ({why}): all must be PEM files, the "
            "key that of the certificate and not encrypted"
        ) from None


def _check_file(path: str, *, secret: bool) -> None:
    try:
        with open(path, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read ({error.strerror}): `shoal cluster-keys` makes ca.pem, cert.pem and key.pem"
        ) from None
    if secret and mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(
            f"{path} may be read by users other than its owner (mode {stat.S_IMODE(mode):o}): chmod 600 it"
        )


def _meet_itself(files: TlsFiles) -> float:
    """Make a connection between two sides with these files, and return when the certificate expires."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = _context(ssl.PROTOCOL_TLS_CLIENT, files).wrap_bio(down, up)
    server = _context(ssl.PROTOCOL_TLS_SERVER, files).wrap_bio(up, down, server_side=True)
    for side in (client, server, client, server):
        with suppress(ssl.SSLWantReadError):
            side.do_handshake()
    seen = server.getpeercert() or {}
    return float(ssl.cert_time_to_seconds(str(seen["notAfter"])))
