"""Record docs/kill.svg: a stream of a real server that continues after one of its workers is killed.

`python tools/record_kill.py` starts a server of the bundled model over two tensor-parallel ranks, requests a stream,
and kills a rank with SIGKILL when the stream has begun. The picture shows the events with their times.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from rich.console import Console
from rich.text import Text

PICTURE = Path(__file__).resolve().parent.parent / "docs" / "kill.svg"
PROMPT = "Count from 3 to 30:"
_TOKENS_BEFORE = 12
_GAP_S = 0.3  # a longer pause of the stream is shown in a separate line
_WIDTH = 92
_WAIT_S = 120.0
_FONTS = re.compile(r"@font-face\s*\{[^}]*\}\s*")  # they would be loaded from another site


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=PICTURE)
    given = parser.parse_args(arguments)
    with _server() as url:
        lines = list(_record(url))
    console = Console(record=True, width=_WIDTH, file=open(os.devnull, "w"))  # noqa: SIM115 - ends with the program
    for line in lines:
        console.print(line)
    picture = console.export_svg(title="shoal serve -tp 2")
    given.output.write_text(_FONTS.sub("", picture), "utf-8")
    print("\n".join(line.plain for line in lines))
    print(f"written: {given.output}")


@contextmanager
def _server() -> Iterator[str]:
    command = [sys.executable, "-m", "shoal", "serve", "--port", "0", "-tp", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if found := re.search(r" at (http://\S+)", line):
                yield found[1]
                return
        raise RuntimeError("the server did not start")
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(_WAIT_S)


def _record(url: str) -> Iterator[Text]:
    """Yield the lines of the recording."""
    body = {"prompt": PROMPT, "stream": True, "temperature": 0, "max_tokens": 80}
    yield Text.assemble(("$ ", "bold"), f"curl -N {url}/v1/completions -d '{json.dumps(body)[:46]}...'")
    begun = last = time.monotonic()
    text, pid = "", 0
    for number, piece in enumerate(_stream(url, body), start=1):
        now = time.monotonic()
        if now - last > _GAP_S and pid:
            yield _at(last - begun, text, "green")
            yield _at(
                now - begun, f"(the rank was started again; the stream goes on after {now - last:.1f} s)", "yellow"
            )
            text = ""
        text += piece
        last = now
        if number == _TOKENS_BEFORE:
            pid = _status(url)["replicas"][0]["stats"]["ranks"][1]["pid"]
            os.kill(pid, signal.SIGKILL)
            yield from _streamed(now - begun, text)
            yield _at(now - begun, f"$ kill -9 {pid}        # rank 1 of 2", "bold red")
            text = ""
    yield from _streamed(last - begun, text)
    restarts = _status(url)["replicas"][0]["restarts"]
    yield Text.assemble(("$ ", "bold"), f"shoal top --once {url}    # restarts: {restarts}")


def _streamed(seconds: float, text: str) -> Iterator[Text]:
    """Yield the line with the text of the stream, unless it is blank."""
    if text.strip():
        yield _at(seconds, text, "green")


def _at(seconds: float, text: str, style: str) -> Text:
    return Text.assemble((f"{seconds:6.2f} s  ", "dim"), (text.strip(), style))


def _stream(url: str, body: dict[str, Any]) -> Iterator[str]:
    headers = {"Content-Type": "application/json"}
    with urlopen(Request(f"{url}/v1/completions", json.dumps(body).encode(), headers), timeout=_WAIT_S) as answer:
        for line in answer:
            data = line.decode().removeprefix("data: ").strip()
            if data and data != "[DONE]":
                yield json.loads(data)["choices"][0]["text"]


def _status(url: str) -> Any:
    with urlopen(f"{url}/v1/admin/status", timeout=_WAIT_S) as answer:
        return json.load(answer)


if __name__ == "__main__":
    main()
