"""The encoding of lists of token ids, and of numbers that belong to them, in messages: four bytes each, little endian.

A prompt of 100,000 tokens passes through several processes. As bytes it is only copied, and the ids need not be read on
the way. Numpy can read them without a copy, with the type `TOKEN_DTYPE`.
"""

import array
import sys
from collections.abc import Iterable
from functools import lru_cache

TOKEN_DTYPE = "<i4"  # numpy's name for int32, little endian

_TOKEN_BYTES = 4


def encode_tokens(tokens: Iterable[int]) -> bytes:
    return _little_endian(array.array("i", tokens))


def decode_tokens(data: bytes) -> list[int]:
    tokens = array.array("i", data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()


def num_tokens(data: bytes | bytearray) -> int:
    """Return the number of encoded tokens."""
    return len(data) // _TOKEN_BYTES


@lru_cache(maxsize=16)  # the outputs of a prompt have the same stop tokens, and are added one after the other
def token_set(data: bytes) -> frozenset[int]:
    return frozenset(decode_tokens(data))


def encode_numbers(numbers: Iterable[float]) -> bytes:
    """Return numbers encoded as float32."""
    return _little_endian(array.array("f", numbers))


def _little_endian(data: "array.array[int] | array.array[float]") -> bytes:
    if sys.byteorder == "big":
        data.byteswap()
    return data.tobytes()
