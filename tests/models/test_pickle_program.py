"""The bounds of a pickle's program: what it could ask for again and again costs no more than its length."""

import io
import pickle
import struct

import pytest

from shoal.models.checkpoint.pickle_program import Refused, read_pickle


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def copying(fetched: int, calls: int) -> bytes:
    """One list of pairs in the memo, and many dicts made of it."""
    pairs = b"".join(number(i) + b"N\x86" for i in range(fetched))
    call = b"ccollections\nOrderedDict\nh\x00R"
    return b"\x80\x02](" + b"](" + pairs + b"e\x85q\x000" + call * calls + b"e."


def test_a_list_is_not_copied_again_and_again() -> None:
    """What calls copy is bounded by the operations; else 10 KB could ask for gigabytes."""
    assert [len(found) for found in read_pickle(io.BytesIO(copying(100, 3)))] == [100] * 3
    with pytest.raises(Refused, match="it copies 400 pairs within 3"):
        read_pickle(io.BytesIO(copying(100, 50)))


def call_of(name: str, arguments: bytes) -> bytes:
    module, _, what = name.rpartition(".")
    return b"\x80\x02c" + f"{module}\n{what}\n".encode() + arguments + b"R."


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"\x80\x02}" + number(2**64) + b"Ns.", "a key of 65 bits"),
        (b"\x80\x02}" + number(-(2**63) - 1) + b"Ns.", "a key of 64 bits"),
        (b"\x80\x02}" + text("x" * 4097) + b"Ns.", "a key of 4097 characters"),
        (b"\x80\x02(" + text("storage") + b"ctorch\nFloatStorage\n" + text("x" * 4097) + b"NK\x01tQ.", "4097 char"),
        (call_of("torch._utils._rebuild_parameter", b"(" + b"N" * 9 + b"t"), "with 9 arguments"),
    ],
)
def test_what_would_be_slow_to_do_again_and_again(program: bytes, message: str) -> None:
    with pytest.raises(Refused, match=message):
        read_pickle(io.BytesIO(program))


@pytest.mark.parametrize("key", [2**64 - 1, -(2**63), "x" * 4096])
def test_the_longest_keys(key: int | str) -> None:
    assert read_pickle(io.BytesIO(pickle.dumps({key: None}, 2))) == {key: None}
