"""Make docs/dashboard.png: the dashboard of a real server under load, one of whose replicas had two ranks killed.

`python tools/dashboard_screenshot.py` needs Debian's packages chromium and chromium-driver, and takes some minutes. It
starts a server with the bundled model, sends requests, and kills a rank twice. It takes the screenshot while the second
one is down.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "dashboard.png"
_FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --hide-scrollbars"
)
_WAIT_S = 120.0


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("--seconds", type=float, default=240, help="how long the server runs before the screenshot")
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--scheme", choices=["light", "dark"], default="light")
    given = parser.parse_args(arguments)
    with _server() as url, _load(url, given.clients), _browser(given.scheme) as driver:
        driver.get(f"{url}/dashboard")
        time.sleep(given.seconds * 0.6)
        _kill(url, replica=1, rank=0)
        time.sleep(given.seconds * 0.4)
        _kill(url, replica=1, rank=1)
        down = "return document.querySelectorAll('[data-rank][data-state=failed]').length > 0"
        _wait_until(lambda: driver.execute_script(down), "the page shows the rank that was killed")
        _size(driver, driver.execute_script("return Math.ceil(document.body.getBoundingClientRect().height)"))
        time.sleep(0.6)  # until the bars have stopped moving
        driver.save_screenshot(str(given.output))
    print(f"written: {given.output}")


@contextmanager
def _server() -> Iterator[str]:
    command = [sys.executable, "-m", "shoal", "serve", "--port", "0", "-tp", "2", "-dp", "2"]
    command += ["--kv-cache-memory-bytes", "2MiB"]  # a small cache, so that its bars are not empty
    command += ["--warm-spares", "0"]  # otherwise a rank that dies is back before the picture is taken
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = next((line for line in process.stdout if " at http" in line), "")
            if not line:
                raise SystemExit("the server did not start")
            yield line.rsplit(" ", 1)[-1].strip()
        finally:
            process.send_signal(signal.SIGTERM)
            process.send_signal(signal.SIGTERM)
            process.wait(_WAIT_S)


@contextmanager
def _load(url: str, clients: int) -> Iterator[None]:
    """Send requests from each client, one after the other. The load comes in waves, and some prompts share a prefix."""
    over = threading.Event()

    def work(number: int) -> None:
        draw = random.Random(number)
        while not over.is_set():
            busy = int(time.monotonic() / 20) % 3 + 1  # how many thirds of the clients send requests
            if number % 3 >= busy:
                over.wait(1)
                continue
            terms = " + ".join(str(draw.randint(10, 99)) for _ in range(draw.randint(2, 12)))
            shared = "Count from 3 to 9: 3 4 5 6 7 8 9. " * 3 if number % 2 else ""
            body = {"prompt": f"{shared}{terms} =", "max_tokens": draw.randint(16, 96), "ignore_eos": True}
            try:
                _call(
                    f"{url}/v1/completions", {**body, "temperature": 1.0, "stream": True, "seed": draw.randrange(999)}
                )
            except URLError as error:
                print(f"request: {error}", file=sys.stderr)
                over.wait(1)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join(_WAIT_S)


@contextmanager
def _browser(scheme: str) -> Iterator[webdriver.Chrome]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = Options()
        options.binary_location = "/usr/bin/chromium"
        for flag in [*_FLAGS.split(), f"--user-data-dir={profile}"]:
            options.add_argument(flag)
        driver = webdriver.Chrome(options, Service("/usr/bin/chromedriver"))
        try:
            feature = {"name": "prefers-color-scheme", "value": scheme}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
            _size(driver, 900)
            yield driver
        finally:
            driver.quit()


def _size(driver: webdriver.Chrome, height: int) -> None:
    size = {"width": 1400, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def _kill(url: str, *, replica: int, rank: int) -> None:
    def pid() -> Any:
        found = json.loads(_call(f"{url}/v1/admin/status"))["replicas"][replica]
        return found["stats"]["ranks"][rank]["pid"] if found["state"] == "ready" and found["stats"] else None

    _wait_until(pid, f"replica {replica} is ready")
    os.kill(pid(), signal.SIGKILL)


def _call(url: str, body: Any = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    with urlopen(Request(url, data, {"Content-Type": "application/json"}), timeout=_WAIT_S) as answer:
        found: bytes = answer.read()
        return found


def _wait_until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + _WAIT_S
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit(f"this did not happen within {_WAIT_S:g} s: {what}")
        time.sleep(0.1)


if __name__ == "__main__":
    main()
