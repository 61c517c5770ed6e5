"""Commands of Shoal on hosts in network namespaces, and requests from there."""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from support import hosts

KEY = "a key of the test"
PORT = 8123  # of servers; free, because the hosts run nothing else
PROMPT = [5, 17, 200, 33, 4, 90, 121]
NUM_TOKENS = 12
SMALL = ["--kv-cache-memory-bytes", "16MiB", "--max-model-len", "128"]
WAIT_S = 120.0


SHOAL = (sys.executable, "-m", "shoal")


class Program:
    """A command of Shoal, or another one, on one of the hosts, with everything that it prints."""

    def __init__(
        self,
        host: hosts.Host,
        *arguments: str,
        command: Sequence[str] = SHOAL,
        environment: dict[str, str] | None = None,
    ) -> None:
        self.host = host
        self.arguments = arguments
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the program
        self.process = subprocess.Popen(
            [*host.inside, *command, *arguments],
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "SHOAL_CLUSTER_KEY": KEY, **(environment or {})},
        )

    @property
    def text(self) -> str:
        return os.pread(self._output.fileno(), 1 << 20, 0).decode()

    def await_text(self, *texts: str) -> None:
        deadline = time.monotonic() + WAIT_S
        while not any(text in self.text for text in texts):
            assert self.process.poll() is None, self.text
            assert time.monotonic() < deadline, f"{texts} not in:\n{self.text}"
            threading.Event().wait(0.02)

    def await_end(self) -> int:
        return self.process.wait(WAIT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self._output.close()


def generation(folder: Path) -> list[str]:
    """Return the beginning of a command that generates tokens after PROMPT."""
    prompts = folder / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt_token_ids": PROMPT}) + "\n")
    parameters = ["--temperature", "0", "--ignore-eos", "--max-tokens", str(NUM_TOKENS)]
    return ["generate", str(folder), "--prompts-file", str(prompts), *parameters, *SMALL]


def ask(host: hosts.Host, prompt: str, seed: int, *, port: int = PORT, **fields: Any) -> list[str]:
    """Return the texts of a stream of 48 sampled tokens. `fields`: further or other fields of the request."""
    body = {"model": "bundled", "prompt": prompt, "max_tokens": 48, "seed": seed, "stream": True, "ignore_eos": True}
    answer = exchange(host, port, "POST", "/v1/completions", json.dumps({**body, **fields}))
    lines = [line[6:] for line in answer.splitlines() if line.startswith("data: {")]
    found = [json.loads(line) for line in lines]
    assert all("choices" in each for each in found), found
    assert "data: [DONE]" in answer, answer
    return [each["choices"][0]["text"] for each in found if each["choices"]]


def exchange(host: hosts.Host, port: int, method: str, path: str, body: str = "") -> str:
    """Return the answer to a request to a server on this host, with its headers."""
    with host.connect(("127.0.0.1", port), 30) as connection:
        connection.settimeout(WAIT_S)
        connection.sendall(
            f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n{body}".encode()
        )
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    return answer.decode()
