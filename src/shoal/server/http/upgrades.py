"""Ignoring offers to switch the protocol (`Upgrade: h2c`, `websocket`, TLS), as RFC 9110, 7.8 allows.

llhttp treats every offer as accepted: for it the request ends with its head, and everything that follows, the
request's own body included, belongs to the other protocol.
"""

from array import array
from typing import Protocol

import httptools


class HeadReader(Protocol):
    """The object whose callbacks a parser calls."""

    def read_again(self) -> "RequestParser":
        """Return a new parser that has read the last head without its offer."""


class RequestParser(httptools.HttpRequestParser):
    """A parser that reads a head with an offer a second time, without it; the second time the request counts.

    The first time `should_upgrade` is true in `on_headers_complete` and `on_message_complete`, which must do nothing.
    """

    def __init__(self, protocol: HeadReader) -> None:
        super().__init__(protocol)
        self._protocol = protocol
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as in uvicorn

    def feed_data(self, data: "bytes | bytearray | memoryview | array[int]") -> None:
        parser, left = self, memoryview(data)
        while (end := parser._feed(left)) is not None:
            left = left[end:]
            parser = self._protocol.read_again()

    def _feed(self, data: memoryview) -> int | None:
        """Return where a head with an offer ends in `data`; None if there is no offer."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            return int(offer.args[0])
        return None
