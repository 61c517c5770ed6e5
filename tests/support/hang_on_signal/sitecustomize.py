"""A module that Python imports when it starts, if its folder is in PYTHONPATH.

The signal SIGUSR1 has a process compute for ever, in the middle of the next step of a rank, outside of communication.
"""

import signal
from types import FrameType

_AGAIN_S = 0.0001


def _hang(number: int, frame: FrameType | None) -> None:
    files = set()
    while frame is not None:
        files.add(frame.f_code.co_filename)
        frame = frame.f_back
    in_step = any(file.endswith("/worker/runner.py") for file in files)
    while in_step and not any("/shoal/comm/" in file for file in files):
        pass
    signal.setitimer(signal.ITIMER_REAL, _AGAIN_S)


signal.signal(signal.SIGUSR1, _hang)
signal.signal(signal.SIGALRM, _hang)
