"""Signals may come at any time, and are handled when it is safe."""

import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from shoal.cli import main as program
from shoal.cli.interrupts import SignalHolder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_waits_for_the_end_of_a_held_block(number: signal.Signals) -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    done = []

    def work() -> None:
        with SignalHolder() as interrupts:
            with interrupts.held():
                done.append("first")
            with interrupts.held():
                signal.raise_signal(number)
                done.append("second")
            done.append("never")

    try:
        with pytest.raises(KeyboardInterrupt):
            work()
        assert done == ["first", "second"]
        for each in before:
            signal.raise_signal(each)  # ignored: what is open is being closed
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_outside_of_held_blocks_an_interrupt_comes_at_once() -> None:
    before = {each: signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt):  # noqa: SIM117 - what is inside is what is tested
            with SignalHolder():
                signal.raise_signal(signal.SIGTERM)
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_without_interrupts_nothing_changes() -> None:
    before = [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="other"), SignalHolder():
        raise ValueError("other")
    assert [signal.getsignal(each) for each in (signal.SIGINT, signal.SIGTERM)] == before


# --- before a command runs ---------------------------------------------------------------------------------------


def test_interrupted_while_modules_are_imported(
    shoal: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def load(path: str) -> None:
        signal.raise_signal(signal.SIGINT)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent of the tests may have SIGINT ignored
    monkeypatch.setattr(program, "load", load)
    assert shoal("generate") == 130
    assert capsys.readouterr().err == "interrupted\n"
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.raise_signal(number)  # pressed again while Python ends: it prints nothing


@pytest.mark.slow
def test_little_is_imported_before_interrupts_are_handled() -> None:
    code = (
        "import sys, shoal.cli.main; print(sorted(name for name in sys.modules if name.startswith(('shoal', 'click'))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    light = [
        "shoal.cli.container_init",
        "shoal.process",
        "shoal.process.garbage_collector",
        "shoal.process.import_path",
        "shoal.process.open_files",
    ]  # which import nothing but the standard library
    assert done.stdout.strip() == str(sorted(["shoal", "shoal.cli", "shoal.cli.main", "shoal.lazy", *light]))
