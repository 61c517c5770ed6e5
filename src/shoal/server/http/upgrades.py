"""Offers to speak another protocol (`Upgrade: h2c`, `websocket`, TLS), which a server may ignore: RFC 9110, 7.8.

llhttp takes every offer as accepted: for it the request ends with its head, and what follows, the request's own body
first of all, is of the other protocol.
"""

from array import array
from typing import Protocol

import httptools


class HeadReader(Protocol):
    """Whom a parser tells what it finds."""

    def read_again(self) -> "RequestParser":
        """A new parser, which has read the last head without its offer."""


class RequestParser(httptools.HttpRequestParser):
    """Has a head with an offer read a second time, without it: only then is the request taken, with its body.

    The first time, `should_upgrade` is true in `on_headers_complete` and `on_message_complete`, which must do nothing.
    """

    def __init__(self, protocol: HeadReader) -> None:
        super().__init__(protocol)
        self._protocol = protocol
        self.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn has it

    def feed_data(self, data: "bytes | bytearray | memoryview | array[int]") -> None:
        parser, left = self, memoryview(data)
        while (end := parser._feed(left)) is not None:
            left = left[end:]
            parser = self._protocol.read_again()

    def _feed(self, data: memoryview) -> int | None:
        """Where an offer ends, if there is one."""
        try:
            super().feed_data(data)
        except httptools.HttpParserUpgrade as offer:
            return int(offer.args[0])
        return None
