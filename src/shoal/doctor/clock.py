"""The clock of this host: whether it is synchronized. The clocks of several hosts are compared in `pairs`."""

import ctypes
import time
from dataclasses import dataclass

from shoal.doctor.kinds import failure, ok, warning
from shoal.wire.doctor import Finding

_EARLIEST = 1735689600  # 2025-01-01: no clock that is right shows an earlier time
_UNSYNCHRONIZED = 0x40  # STA_UNSYNC (adjtimex(2))
_ERROR = 5  # TIME_ERROR


@dataclass(frozen=True, slots=True)
class ClockFacts:
    """The time, and whether the kernel counts the clock as synchronized; None if it does not say."""

    now: float
    synchronized: bool | None


class _Timex(ctypes.Structure):
    """The beginning of struct timex, and room for the rest."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_byte * 256),
    )


def gather() -> ClockFacts:
    """Ask the kernel for the state of the clock (adjtimex, which changes nothing here)."""
    state = _Timex()
    try:
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(ctypes.byref(state))
    except AttributeError:  # not Linux
        answer = -1
    synchronized = None if answer < 0 else answer != _ERROR and not state.status & _UNSYNCHRONIZED
    return ClockFacts(time.time(), synchronized)


def check(facts: ClockFacts, *, several_hosts: bool) -> list[Finding]:
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(facts.now))
    if facts.now < _EARLIEST:
        return [failure("clock", f"the clock shows {shown}, which is in the past: certificates will be refused")]
    if facts.synchronized is False and several_hosts:
        return [warning("clock", f"the clock shows {shown}, and nothing synchronizes it")]
    state = {True: "synchronized", False: "not synchronized", None: "it is not known whether it is synchronized"}
    return [ok("clock", f"{shown}, {state[facts.synchronized]}")]
