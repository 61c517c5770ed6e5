"""The connections between hosts: latency, bandwidth and the difference of the clocks, measured for every pair.

Each host listens at its address. In each round every host has one partner at most, so that no pair disturbs another.
The host with the higher rank connects and measures; the other one answers. The protocol: the token and the rank of the
host that connects; then `p` (ping, answered with the time), `u` and a number of bytes (which follow, and are
acknowledged), `d` and a number of bytes (which the other side sends), until the connection is closed.
"""

import contextlib
import secrets
import socket
import statistics
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping

from shoal import addresses
from shoal.addresses import Address, join_host_port
from shoal.errors import ConfigError
from shoal.wire.topology import HostPair, PairAddress, with_fields

_CONNECT_S, _SILENCE_S = 3.0, 5.0
_STREAM_S = 0.2  # how long the bandwidth of one direction is measured
_PAIR_S = 12.0  # the longest time for one pair
_PINGS = 50
_FIRST_BYTES, _MOST_BYTES = 1 << 20, 256 << 20
_TOKEN_BYTES = 32
_HEADER, _COMMAND, _CLOCK = struct.Struct(f"<{_TOKEN_BYTES}sI"), struct.Struct("<cQ"), struct.Struct("<d")
_BLOCK = bytes(1 << 20)


def measure_pairs(
    server: "PairServer",
    rank: int,
    size: int,
    places: Mapping[int, PairAddress],
    *,
    stream_s: float = _STREAM_S,
    within_s: float = float("inf"),
) -> tuple[HostPair, ...]:
    """Measure the connections between this host and those with lower ranks, while those with higher ranks measure.

    All hosts call this at the same time.

    Args:
        places: where each host awaits the others, by rank. Hosts that are not in it are left out.
        stream_s: how long the bandwidth of one direction is measured.
        within_s: the longest time for all connections; those that are left then have an error.
    """
    found: list[HostPair] = []
    end = time.monotonic() + within_s
    for first, second in my_rounds(rank, size):
        other = second if first == rank else first
        if other not in places:
            continue
        left = min(_PAIR_S, end - time.monotonic())
        if rank == first:
            server.await_end(other, max(left, 0.0))
        elif left > 0:
            found += measure_pair(rank, other, places[other], stream_s, left)
        else:
            why = f"it was not measured within the {within_s:g} s for all connections"
            found.append(HostPair(source=rank, target=other, error=why))
    return tuple(found)


def my_rounds(rank: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield the pairs of a host in the order of the rounds, as (lower, higher) rank."""
    for pairs in rounds(size):
        yield from (pair for pair in pairs if rank in pair)


def rounds(size: int) -> list[list[tuple[int, int]]]:
    """Return rounds in which every pair of hosts comes once, and every host once in a round at most (circle method)."""
    places: list[int | None] = [*range(size), *([None] if size % 2 else [])]
    half = len(places) // 2
    found = []
    for _ in range(len(places) - 1):
        pairs = zip(places[:half], reversed(places[half:]), strict=True)
        found.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return found


class PairServer:
    """Answers the hosts that measure the connection to this host. Each has a thread of its own."""

    def __init__(self, address: str) -> None:
        """Listen at an address of this host, on a port that the operating system chooses.

        Raises:
            ConfigError: that is not possible.
        """
        try:
            self._listener = addresses.listen(address, 0)[0]
        except OSError as error:
            raise ConfigError(f"can't listen at {address} for other hosts: {error.strerror}") from None
        token = secrets.token_hex(_TOKEN_BYTES // 2)
        self.place = PairAddress(address=address, port=self._listener.getsockname()[1], token=token)
        self._ended: dict[int, threading.Event] = defaultdict(threading.Event)
        self._closing = False
        threading.Thread(target=self._accept, daemon=True, name="doctor-pairs").start()

    def __enter__(self) -> "PairServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Answer no more hosts. Idempotent."""
        self._closing = True
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread
        self._listener.close()

    def await_end(self, rank: int, timeout_s: float) -> None:
        """Wait until a host has measured the connection."""
        self._ended[rank].wait(timeout_s)

    def _accept(self) -> None:
        while not self._closing:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(sock,), daemon=True, name="doctor-pair").start()

    def _answer(self, sock: socket.socket) -> None:
        rank = -1
        with sock, contextlib.suppress(OSError, struct.error):
            sock.settimeout(_SILENCE_S)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            token, rank = _HEADER.unpack(_receive(sock, _HEADER.size))
            if not secrets.compare_digest(token, self.place.token.encode()):
                rank = -1
                return
            while True:
                _serve(sock, *_COMMAND.unpack(_receive(sock, _COMMAND.size)))
        if rank >= 0:
            self._ended[rank].set()


def _serve(sock: socket.socket, command: bytes, count: int) -> None:
    if command == b"p":
        sock.sendall(_CLOCK.pack(time.time()))
    elif command == b"u":
        _drop(sock, count)
        sock.sendall(b"k")
    elif command == b"d":
        _fill(sock, count)


def measure_pair(
    rank: int, other: int, place: PairAddress, stream_s: float = _STREAM_S, within_s: float = _PAIR_S
) -> list[HostPair]:
    """Measure the connection to a host. Return both directions, or one with the error.

    Args:
        stream_s: how long the bandwidth of one direction is measured.
        within_s: the longest wait for an answer.
    """
    try:
        with addresses.connect(Address(place.address, place.port), min(_CONNECT_S, within_s)) as sock:
            sock.settimeout(min(_SILENCE_S, within_s))
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.sendall(_HEADER.pack(place.token.encode(), rank))
            latency, offset = _ping(sock)
            up, down = _stream(sock, b"u", stream_s), _stream(sock, b"d", stream_s)
    except OSError as error:
        where = join_host_port(place.address, place.port)
        why = f"no connection to {where}: {error.strerror or str(error) or type(error).__name__}"
        return [HostPair(source=rank, target=other, error=why)]
    micro = round(latency * 1e6, 1)
    there = HostPair(source=rank, target=other, latency_us=micro, bandwidth=round(up), clock_offset_s=round(offset, 6))
    back = with_fields(there, source=other, target=rank, bandwidth=round(down), clock_offset_s=-round(offset, 6))
    return [there, back]


def _ping(sock: socket.socket) -> tuple[float, float]:
    """Return half of the median time of a round trip, and the other clock minus ours, in seconds."""
    trips, offsets = [], []
    for _ in range(_PINGS):
        sent, begun = time.time(), time.perf_counter()
        sock.sendall(_COMMAND.pack(b"p", 0))
        (theirs,) = _CLOCK.unpack(_receive(sock, _CLOCK.size))
        took = time.perf_counter() - begun
        trips.append(took)
        offsets.append((took, theirs - (sent + took / 2)))
    return statistics.median(trips) / 2, min(offsets)[1]  # the shortest trip tells most about the clocks


def _stream(sock: socket.socket, command: bytes, stream_s: float) -> float:
    """Return the bytes per second in one direction: a first stream shows how long the measured one must be."""
    first = _FIRST_BYTES / _timed_stream(sock, command, _FIRST_BYTES)
    count = int(min(max(first * stream_s, _FIRST_BYTES), _MOST_BYTES))
    return count / _timed_stream(sock, command, count)


def _timed_stream(sock: socket.socket, command: bytes, count: int) -> float:
    begun = time.perf_counter()
    sock.sendall(_COMMAND.pack(command, count))
    if command == b"u":
        _fill(sock, count)
        _receive(sock, 1)
    else:
        _drop(sock, count)
    return max(time.perf_counter() - begun, 1e-9)


def _fill(sock: socket.socket, count: int) -> None:
    block = memoryview(_BLOCK)
    while count > 0:
        sock.sendall(block[: min(count, len(_BLOCK))])
        count -= len(_BLOCK)


def _drop(sock: socket.socket, count: int) -> None:
    buffer = bytearray(len(_BLOCK))
    while count > 0:
        received = sock.recv_into(buffer, min(count, len(buffer)))
        if not received:
            raise ConnectionError("the other side has closed the connection")
        count -= received


def _receive(sock: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        part = sock.recv(count - len(data))
        if not part:
            raise ConnectionError("the other side has closed the connection")
        data += part
    return bytes(data)
