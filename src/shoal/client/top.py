"""`shoal top` shows a server's status, live or once."""

import asyncio
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live

from shoal.client.http import ServerClient
from shoal.client.status_history import StatusHistory
from shoal.client.top_screen import screen
from shoal.errors import ShoalError

_PATH = "/v1/admin/status"
_TIMEOUT_S = 10.0
_PLAIN_WIDTH = 120  # characters in a line without a terminal
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def show_status(
    url: str, *, interval: float = 1.0, once: bool = False, api_key: str | None = None, console: Console | None = None
) -> None:
    """Show the server's status live on a terminal. Without a terminal, or with `once`, print it once.

    Raises:
        ShoalError: the status can't be read.
    """
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, _PLAIN_WIDTH)
    live = console.is_terminal and not once
    asyncio.run((watch if live else snapshot)(url, console, interval=interval, api_key=api_key))


async def snapshot(url: str, console: Console, *, interval: float = 1.0, api_key: str | None = None) -> None:
    """Print the tables once. Rates need two statuses, which are read `interval` seconds apart.

    Raises:
        ShoalError: the status can't be read.
    """
    history = StatusHistory()
    async with ServerClient(url, api_key=api_key, timeout=_TIMEOUT_S) as client:
        history.add(await client.get_json(_PATH))
        await asyncio.sleep(interval)
        history.add(await client.get_json(_PATH))
    console.print(screen(history, width=console.width))


async def watch(url: str, console: Console, *, interval: float = 1.0, api_key: str | None = None) -> None:
    """Show the tables on the terminal until q, Ctrl-C or SIGTERM. If the server goes away, wait until it is back.

    Raises:
        ShoalError: the first status can't be read.
    """
    stop = asyncio.Event()
    async with ServerClient(url, api_key=api_key, timeout=_TIMEOUT_S) as client:
        history, trouble = StatusHistory(), _Trouble()
        history.add(await client.get_json(_PATH))
        with _set_by_keys_and_signals(stop), Live(console=console, screen=True, auto_refresh=False) as live:
            while not stop.is_set():
                size = console.size
                tables = screen(history, width=size.width, lines=size.height, trouble=trouble.words())
                live.update(tables, refresh=True)
                if await _set_within(stop, interval):
                    return
                reading = asyncio.create_task(_read(client, history))
                stopping = asyncio.create_task(stop.wait())
                await asyncio.wait({reading, stopping}, return_when=asyncio.FIRST_COMPLETED)
                stopping.cancel()
                if not reading.done():
                    reading.cancel()
                    return
                trouble.note(reading.result())


class _Trouble:
    """The reason why the server does not answer, and since when."""

    def __init__(self) -> None:
        self._why = ""
        self._since = 0.0

    def note(self, why: str) -> None:
        if why and not self._why:
            self._since = time.monotonic()
        self._why = why

    def words(self) -> str:
        return self._why and f"{self._why}; trying again for {time.monotonic() - self._since:.0f} s"


async def _read(client: ServerClient, history: StatusHistory) -> str:
    """Add a new status. Return the error if it can't be read, else ""."""
    try:
        history.add(await client.get_json(_PATH))
    except ShoalError as error:
        return str(error)
    return ""


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), seconds)
    except TimeoutError:
        return False
    return True


@contextmanager
def _set_by_keys_and_signals(stop: asyncio.Event) -> Iterator[None]:
    """Have q, Ctrl-C and SIGTERM set `stop` inside. Keys are read at once and not shown."""
    loop = asyncio.get_running_loop()
    handlers = {number: signal.getsignal(number) for number in _SIGNALS}
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    keys = sys.stdin.fileno() if sys.stdin.isatty() else None
    before = None
    if keys is not None:
        before = termios.tcgetattr(keys)
        tty.setcbreak(keys)
        loop.add_reader(keys, _read_keys, keys, stop)
    try:
        yield
    finally:
        if keys is not None and before is not None:
            loop.remove_reader(keys)
            termios.tcsetattr(keys, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def _read_keys(keys: int, stop: asyncio.Event) -> None:
    pressed = os.read(keys, 64)
    if not pressed or b"q" in pressed.lower():
        stop.set()
