"""Lists of token ids, and of numbers for them, as messages carry them: bytes, little endian, four to an entry.

A prompt of 100,000 tokens is copied through several processes; as bytes that costs a copy of memory, and nobody looks
at the ids on the way. Whoever has numpy reads them in place, as `TOKEN_DTYPE`.
"""

import array
import sys
from collections.abc import Iterable
from functools import lru_cache

TOKEN_DTYPE = "<i4"  # as numpy names it

_TOKEN_BYTES = 4


def encode_tokens(tokens: Iterable[int]) -> bytes:
    return _little_endian(array.array("i", tokens))


def decode_tokens(data: bytes) -> list[int]:
    tokens = array.array("i", data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()


def num_tokens(data: bytes | bytearray) -> int:
    """Return how many tokens there are, without looking at them."""
    return len(data) // _TOKEN_BYTES


@lru_cache(maxsize=16)  # for the outputs of a request, which come one after the other
def token_set(data: bytes) -> frozenset[int]:
    return frozenset(decode_tokens(data))


def encode_numbers(numbers: Iterable[float]) -> bytes:
    """Return numbers as float32."""
    return _little_endian(array.array("f", numbers))


def _little_endian(data: "array.array[int] | array.array[float]") -> bytes:
    if sys.byteorder == "big":
        data.byteswap()
    return data.tobytes()
