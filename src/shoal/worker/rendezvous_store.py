"""The keys and values of a rendezvous as a store of torch.distributed, by which ranks of several hosts connect."""

import datetime
import threading
import time
from collections.abc import Sequence

import torch.distributed

from shoal.addresses import Address
from shoal.errors import CommError, CommTimeout
from shoal.transport.channel import Channel, ChannelClosed, wait
from shoal.transport.connecting import connect
from shoal.wire.base import encode
from shoal.wire.credentials import Credentials
from shoal.wire.rendezvous import (
    JoinRefused,
    StoreAdd,
    StoreDelete,
    StoreGet,
    StoreSet,
    StoreValue,
    ToRendezvous,
    from_rendezvous,
)


class RendezvousStore(torch.distributed.Store):  # type: ignore[name-defined,misc]  # it has no usable types
    """A store of torch.distributed at a rendezvous. Values are bytes; numbers are decimal text.

    It has one connection, on which one question is asked at a time.
    """

    def __init__(self, address: str, credentials: Credentials, *, timeout_s: float) -> None:
        """Connect to the rendezvous at `address`, host:port.

        Raises:
            ConfigError: it cannot be reached in time, or has another shared key or CA.
        """
        super().__init__()
        self._address = Address.parse(address)
        self._timeout_s = timeout_s
        self._channel: Channel = connect(self._address, credentials, timeout=timeout_s)
        self._lock = threading.Lock()

    @property
    def host_address(self) -> str:
        """The address of this host, as the rendezvous reaches it."""
        return self._channel.local_address

    def close(self) -> None:
        """End the connection, and the waits of other threads for values."""
        self._channel.shut_down()
        self._channel.close()

    def set(self, key: str, value: str | bytes) -> None:
        self._ask(StoreSet(key, _bytes(value)))

    def compare_set(self, key: str, expected_value: str | bytes, desired_value: str | bytes) -> bytes:
        found = self._ask(StoreSet(key, _bytes(desired_value), expected=_bytes(expected_value)))
        return found or b""

    def get(self, key: str) -> bytes:
        return self._ask(StoreGet((key,), wait=True)) or b""

    def add(self, key: str, amount: int) -> int:
        return int(self._ask(StoreAdd(key, amount)) or b"0")

    def check(self, keys: Sequence[str]) -> bool:
        return self._ask(StoreGet(tuple(keys), wait=False)) is not None

    def wait(self, keys: Sequence[str], timeout: datetime.timedelta | None = None) -> None:
        seconds = self._timeout_s if timeout is None else timeout.total_seconds()
        self._ask(StoreGet(tuple(keys), wait=True), seconds)

    def delete_key(self, key: str) -> bool:
        return self._ask(StoreDelete(key)) is not None

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        self._timeout_s = timeout.total_seconds()

    def has_extended_api(self) -> bool:
        return False

    def _ask(self, question: ToRendezvous, timeout_s: float | None = None) -> bytes | None:
        """Ask the store, and return its answer.

        Raises:
            CommTimeout: there was no answer in time, because a key is missing or the rendezvous has ended.
            CommError: the rendezvous refused the question, and has closed the connection.
        """
        seconds = self._timeout_s if timeout_s is None else timeout_s
        with self._lock:
            try:
                self._channel.send(encode(question))
                return self._answer(time.monotonic() + seconds)
            except ChannelClosed as error:
                raise CommTimeout(f"the rendezvous at {self._address} has ended: {error}") from None
            except TimeoutError:
                # The answer may still come, and must not be mistaken for the answer to the next question.
                self._channel.close()
                raise CommTimeout(f"the store at {self._address}: no answer to {question} in {seconds:g} s") from None

    def _answer(self, deadline: float) -> bytes | None:
        while True:
            left = deadline - time.monotonic()
            if left <= 0 or (not self._channel.has_frame and not wait([self._channel], left)):
                raise TimeoutError
            for frame in self._channel.receive(1):
                message = from_rendezvous.decode(frame)
                if isinstance(message, StoreValue):
                    return message.value
                if isinstance(message, JoinRefused):
                    raise CommError(f"the store at {self._address}: {message.why}")


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else bytes(value)
