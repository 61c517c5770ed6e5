"""`shoal serve` over two hosts (network namespaces): headless hosts, and hosts that serve their own replicas."""

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import pytest

from shoal.activity import AWAKE
from shoal.cluster.replicas.connected_replica import ConnectedReplica
from shoal.cluster.replicas.rendezvous_doors import FleetDoor
from shoal.errors import EngineError
from shoal.launch.open_model import open_model
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.credentials import Credentials
from shoal.wire.rendezvous import FRONT_END_DOOR
from support import hosts

pytestmark = pytest.mark.slow  # starts processes

EXAMPLE = Path(__file__).parent.parent / "examples" / "async_llm_hosts.py"
KEY = "a key of the test"
PORT = 29571  # free, because the hosts run nothing else
SMALL = ["--kv-cache-memory-bytes", "16MiB", "--max-model-len", "256", "--start-timeout", "240"]
needs_hosts = pytest.mark.skipif(bool(hosts.obstacle()), reason=hosts.obstacle())
PROMPTS = [f"{i} + 45 =" for i in range(6)]


@dataclass(slots=True)
class Program:
    """A running program, and its log, which a thread reads."""

    process: "subprocess.Popen[str]"
    host: hosts.Host | None
    log: list[str] = field(default_factory=list)
    reader: threading.Thread = field(init=False)

    def __post_init__(self) -> None:
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                self.log.append(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(60)
        self.reader.join(60)  # until its children, which also write to the log, have ended

    @property
    def text(self) -> str:
        return "".join(list(self.log))

    def await_line(self, pattern: str) -> str:
        """Wait until a pattern matches in the log. Return what its first group matches."""
        until(lambda: re.search(pattern, self.text) or self.process.poll() is not None, pattern, self)
        found = re.search(pattern, self.text)
        assert found, self.text
        return found[1] if found.groups() else found[0]

    def await_end(self) -> int:
        """Wait until the program has ended and its log is complete. Return the exit code."""
        until(lambda: self.process.poll() is not None, "it ends", self)
        self.reader.join(60)
        return int(self.process.returncode)


def until(reached: Callable[[], object], what: str, program: Program, seconds: float = 280.0) -> None:
    deadline = time.monotonic() + seconds
    while not reached():
        assert time.monotonic() < deadline, f"{what}:\n{program.text}"
        threading.Event().wait(0.05)


@contextlib.contextmanager
def programs() -> Iterator[Callable[..., Program]]:
    """Yield a function that starts `shoal serve` with some arguments on a host. All are killed at the end."""
    started: list[Program] = []

    def start(*arguments: str, on: hosts.Host | None = None) -> Program:
        inside = [] if on is None else on.inside
        process = subprocess.Popen(
            [*inside, sys.executable, "-m", "shoal", "serve", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "SHOAL_CLUSTER_KEY": KEY},
        )
        started.append(Program(process, on))
        return started[-1]

    try:
        yield start
    except BaseException:
        for program in started:
            print(program.text, file=sys.stderr)
        raise
    finally:
        for program in started:
            program.close()


def ask(server: Program, url: str, body: Mapping[str, Any] | None = None) -> str:
    """Send a request from the server's own host, and return the body of the answer."""
    parts = urllib.parse.urlsplit(url)
    assert parts.hostname is not None
    assert parts.port is not None
    with contextlib.closing(http.client.HTTPConnection(parts.hostname, parts.port, timeout=280)) as connection:
        if server.host is not None:
            connection.sock = server.host.connect((parts.hostname, parts.port), 280)
        path = parts._replace(scheme="", netloc="").geturl()
        if body is None:
            connection.request("GET", path)
        else:
            connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
    assert answer.status == 200, text + server.text
    return text


def stream(server: Program, url: str, prompt: str, model: str = "bundled", tokens: int = 40) -> str:
    """Return the text of a streamed completion. Every other prompt is sampled, with a seed; the others are greedy."""
    number = PROMPTS.index(prompt)
    sampling = {"temperature": 1.0, "seed": number} if number % 2 else {"temperature": 0}
    body = {"prompt": prompt, "max_tokens": tokens, "stream": True, "ignore_eos": True, **sampling}
    answer = ask(server, f"{url}/v1/completions", {"model": model, **body})
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(choice["text"] for event in events[:-1] for choice in json.loads(event)["choices"])


def states(server: Program, url: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(ask(server, f"{url}/v1/admin/status"))["replicas"]
    return found


def rank_pids(server: Program, url: str) -> list[int]:
    return [rank["pid"] for replica in states(server, url) for rank in replica["stats"]["ranks"]]


def check_disturbed_streams(server: Program, url: str, disturb: Callable[[], object]) -> None:
    """Check that the streams of all prompts are the same if they are disturbed."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        wanted = list(pool.map(lambda prompt: stream(server, url, prompt), PROMPTS))
        futures = [pool.submit(stream, server, url, prompt) for prompt in PROMPTS]
        until(lambda: all(replica["held"] for replica in states(server, url)), "both have requests", server)
        disturb()
        assert [future.result() for future in futures] == wanted


def ready_url(server: Program, *, replicas: int) -> str:
    url = server.await_line(r"listening at (http://[\d.:]+\d)")
    until(
        lambda: [replica["state"] for replica in states(server, url)] == ["ready"] * replicas, "all are ready", server
    )
    return url


def head_and_headless(pair: tuple[hosts.Host, hosts.Host]) -> tuple[list[str], list[str]]:
    """Return the arguments of a front end, and of a headless host."""
    common = ["-dp", "2", "--data-parallel-address", pair[0].address, "--data-parallel-rpc-port", str(PORT), *SMALL]
    head = [*common, "--data-parallel-size-local", "1", "--port", "0"]
    return head, [*common, "--headless", "--data-parallel-start-rank", "1"]


@needs_hosts
def test_a_headless_host_may_start_first_and_its_replica_may_be_killed_and_cut_off() -> None:
    with hosts.two_hosts() as pair, programs() as start:
        for_head, for_headless = head_and_headless(pair)
        headless = start(*for_headless, on=pair[1])
        headless.await_line("replicas 1 of 2 for the front end")
        head = start(*for_head, on=pair[0])
        url = ready_url(head, replicas=2)
        first = states(head, url)[1]["pid"]
        check_disturbed_streams(head, url, lambda: os.kill(first, signal.SIGKILL))
        ready_url(head, replicas=2)
        assert states(head, url)[1]["pid"] != first
        assert "was killed by SIGKILL; it is started again" in headless.text
        check_disturbed_streams(head, url, lambda: hosts.cut(pair[1]))
        assert [replica["state"] for replica in states(head, url)] == ["ready", "awaited"]
        assert "ended, or lost its connection" in states(head, url)[1]["cause"]
        for program in (headless, head):
            program.process.send_signal(signal.SIGTERM)
            assert program.await_end() == 0, program.text


@needs_hosts
def test_hosts_meet_over_ipv6_where_the_front_end_starts_first() -> None:
    """Each host puts its own interface into the link-local address of the first."""
    with hosts.two_hosts() as (first, second), programs() as start:
        here = first.link_local
        there = f"{here.partition('%')[0]}%{second.link_local.partition('%')[2]}"
        common = ["-dp", "1", "--data-parallel-rpc-port", str(PORT), *SMALL]
        door = ["--data-parallel-size-local", "0", "--data-parallel-address", f"[{here}]"]
        head = start(*common, *door, "--host", "::1", "--port", "0", on=first)
        url = head.await_line(r"listening at (http://\[::1\]:\d+)")
        headless = start(*common, "--headless", "--data-parallel-address", there, on=second)
        headless.await_line(rf"for the front end at \[{re.escape(there)}\]:{PORT}")
        until(lambda: [each["state"] for each in states(head, url)] == ["ready"], "it is ready", head)
        assert stream(head, url, PROMPTS[0], tokens=4)
        top = [*first.inside, sys.executable, "-m", "shoal", "top", "--once", url.removeprefix("http://")]
        assert "ready" in subprocess.run(top, capture_output=True, text=True, check=True).stdout


@pytest.fixture(scope="module")
def front_end() -> Iterator[str]:
    """Open the door of a front end that awaits replica 1 of 2 of the bundled model, and yield its port."""
    opened = open_model(None, {"data_parallel_size": 2, "max_model_len": 256}, online=True)
    door = FleetDoor(
        size=2, awaited=[1], agreement=opened.agreement, make_plan=opened.plan_elsewhere, answer_timeout=60
    )
    arrived: list[ConnectedReplica] = []
    door.open(lambda _, arrival: arrived.append(arrival))
    with Rendezvous(credentials=Credentials(KEY), doors={FRONT_END_DOOR: door}) as rendezvous:
        yield rendezvous.address.rpartition(":")[2]
    for arrival in arrived:
        arrival.close()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-dp", "2", "bundled:moe"], r"its config.json is \w+, that of the front end \(.*\) is \w+"),
        (["-dp", "2", "--block-size", "32"], "its --block-size is 32, that of the front end .* is 16"),
        (["-dp", "3"], "it expects 3 replicas, but the front end .* expects 2"),
        (
            ["-dp", "2", "--kv-cache-memory-bytes", "9000TiB"],
            r"1 rank needs? .* more than this host has available: lower",
        ),
    ],
)
def test_a_host_that_differs_is_refused_before_it_loads(front_end: str, arguments: list[str], message: str) -> None:
    with programs() as start:
        where = ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", front_end]
        which = ["--headless", "--data-parallel-start-rank", "1", "--data-parallel-size-local", "1"]
        program = start(*SMALL, *where, *which, *arguments)
        assert program.await_end() == 2
        assert re.search(rf"replica 1: rank 1 may not join at 127.0.0.1:{front_end}: {message}", program.text)
        assert "engine ready" not in program.text


def test_a_replica_is_started_again_until_it_is_dismissed() -> None:
    """A stopped replica is started again. One whose front end has gone connects to the next, and tells its state."""
    opened = open_model(None, {"max_model_len": 256}, online=True)
    door = FleetDoor(
        size=1, awaited=[0], agreement=opened.agreement, make_plan=opened.plan_elsewhere, answer_timeout=60
    )
    arrivals: SimpleQueue[ConnectedReplica] = SimpleQueue()
    door.open(lambda _, arrival: arrivals.put(arrival))
    with Rendezvous(credentials=Credentials(KEY), doors={FRONT_END_DOOR: door}) as rendezvous, programs() as start:
        port = rendezvous.address.rpartition(":")[2]
        program = start("--headless", "--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", port, *SMALL)
        first = arrivals.get(timeout=280)
        first.await_ready(280)
        os.kill(first.pid, signal.SIGSTOP)
        with pytest.raises(EngineError, match=r"replica 0 \(.*\) ended, or lost its connection"):
            first.stats(280)
        second = arrivals.get(timeout=280)
        second.await_ready(280)
        assert second.pid != first.pid
        assert re.search(
            rf"process {first.pid} is stopped \(SIGSTOP or a debugger\); it is started again", program.text
        )
        second.set_activity(AWAKE.sleep(1))
        second.close()  # as if the front end had ended
        third = arrivals.get(timeout=280)
        stats = third.ready(280)
        assert third.pid == second.pid, "it is the same process"
        assert stats is not None
        assert stats.activity == AWAKE.sleep(1)
        third.set_activity(AWAKE)
        assert all(rank.weight_bytes for rank in third.stats(280).ranks)
        third.dismiss()
        assert program.await_end() == 0
        assert "the front end has taken out all replicas of this host" in program.text
        third.close()


@needs_hosts
def test_experts_on_two_hosts_sleep_and_go_on_when_a_rank_dies() -> None:
    with hosts.two_hosts() as pair, programs() as start:
        head, headless = head_and_headless(pair)
        mixture = ["bundled:moe", "--enable-expert-parallel", "--served-model-name", "bundled"]
        start(*headless, *mixture, on=pair[1])
        server = start(*head, *mixture, on=pair[0])
        url = ready_url(server, replicas=2)

        wanted = stream(server, url, PROMPTS[1], tokens=40)
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(stream, server, url, PROMPTS[1], tokens=40)
            until(lambda: any(replica["held"] for replica in states(server, url)), "one has requests", server)
            assert json.loads(ask(server, f"{url}/sleep?mode=keep", {}))["status"] == "asleep"
            ranks = [rank for replica in states(server, url) for rank in replica["stats"]["ranks"]]
            assert [rank["weight_bytes"] for rank in ranks] == [0, 0]
            assert json.loads(ask(server, f"{url}/wake_up", {}))["status"] == "awake"
            assert future.result() == wanted

            future = pool.submit(stream, server, url, PROMPTS[1], tokens=40)
            until(lambda: any(replica["held"] for replica in states(server, url)), "one has requests", server)
            before = rank_pids(server, url)
            os.kill(before[1], signal.SIGKILL)
            assert future.result() == wanted
        until(lambda: rank_pids(server, url)[1] != before[1], "the rank has another process", server)
        assert rank_pids(server, url)[0] == before[0]
        assert [replica["restarts"] for replica in states(server, url)] == [0, 0]


def test_a_missing_front_end_is_an_error_with_the_address_and_the_seconds() -> None:
    with programs() as start:
        where = ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", "9"]
        program = start("--headless", *where, "--start-timeout", "1")
        assert program.await_end() == 2
        assert re.search(r"no answer from 127.0.0.1:9 within 1 s", program.text)


@needs_hosts
def test_each_host_serves_its_own_replica_and_they_share_experts() -> None:
    with hosts.two_hosts() as pair, programs() as start:
        where = ["--data-parallel-address", pair[0].address, "--data-parallel-rpc-port", str(PORT)]
        common = ["bundled:moe", "-dp", "2", "--enable-expert-parallel", "--port", "0", *where, *SMALL]
        second = start(*common, "--data-parallel-rank", "1", on=pair[1])
        first = start(*common, "--data-parallel-hybrid-lb", "--data-parallel-size-local", "1", on=pair[0])
        urls = [ready_url(server, replicas=1) for server in (first, second)]
        places = list(zip((first, second), urls, strict=True))
        for number, (server, url) in enumerate(places):
            assert [replica["number"] for replica in states(server, url)] == [number]
        with ThreadPoolExecutor(2 * len(PROMPTS)) as pool:

            def start_streams() -> list[Future[str]]:
                return [
                    pool.submit(stream, server, url, prompt, "bundled:moe")
                    for server, url in places
                    for prompt in PROMPTS
                ]

            wanted = [future.result() for future in start_streams()]
            futures = start_streams()
            until(lambda: all(states(*place)[0]["held"] for place in places), "both have requests", second)
            os.kill(states(*places[1])[0]["pid"], signal.SIGKILL)
            assert [future.result() for future in futures] == wanted  # after both replicas have started again
        assert [states(*place)[0]["restarts"] for place in places] == [1, 1]


def test_each_host_serves_its_own_replica_of_a_model_without_experts() -> None:
    """After the hosts have compared their agreement, neither needs the other, not even the one with replica 0."""
    with programs() as start:
        where = ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", str(hosts.free_port())]
        common = ["-dp", "2", "--data-parallel-size-local", "1", "--port", "0", *where, *SMALL]
        second = start(*common, "--data-parallel-rank", "1")
        first = start(*common, "--data-parallel-hybrid-lb", "--data-parallel-start-rank", "0")
        urls = [ready_url(server, replicas=1) for server in (first, second)]
        places = list(zip((first, second), urls, strict=True))
        assert [states(*place)[0]["number"] for place in places] == [0, 1]
        wanted = [stream(second, urls[1], prompt) for prompt in PROMPTS[:2]]
        assert [stream(first, urls[0], prompt) for prompt in PROMPTS[:2]] == wanted
        first.close()
        os.kill(states(second, urls[1])[0]["pid"], signal.SIGKILL)
        assert [stream(second, urls[1], prompt) for prompt in PROMPTS[:2]] == wanted
        second.process.send_signal(signal.SIGTERM)
        assert second.await_end() == 0, second.text


def test_an_async_llm_uses_replicas_on_other_hosts_only() -> None:
    """Run the example with the command from its docstring."""
    with programs() as start:
        port = str(hosts.free_port())
        where = ["--data-parallel-address", "127.0.0.1", "--data-parallel-rpc-port", port]
        headless = start("--headless", "-dp", "1", *where, *SMALL)
        command = [sys.executable, str(EXAMPLE), "--dp-size", "1", "--port", port, "--max-model-len", "256"]
        environment = {**os.environ, "SHOAL_CLUSTER_KEY": KEY}
        done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False, env=environment)
        assert done.returncode == 0, done.stderr + headless.text
        answers = done.stdout.splitlines()
        assert len(answers) == 7
        assert "82" in answers[0]
        headless.await_line("the front end is gone: its requests are dropped; waiting for a front end to come back")
        headless.process.send_signal(signal.SIGTERM)
        assert headless.await_end() == 0, headless.text
