"""`shoal bench serve` against a server whose answers are scripted."""

import asyncio
import itertools
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from shoal.client.load.workload import arrivals
from support.openai_server import MODEL, Body, OpenAIServer, answer_all, begin, chunk, error, event, usage

Shoal = Callable[..., int]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def bench(shoal: Shoal, capsys: Capture) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Return a function that runs `shoal bench serve` and returns exit code and report."""

    def run(server: OpenAIServer, *flags: object) -> tuple[int, dict[str, Any]]:
        code = shoal("bench", "serve", server.url, "--json", *flags)
        out, err = capsys.readouterr()
        assert out, err
        return code, json.loads(out)

    return run


Bench = Callable[..., tuple[int, dict[str, Any]]]


def test_closed_loop(bench: Bench) -> None:
    """No request is answered before three have arrived, and there are never more at once."""
    together: list[asyncio.Future[None]] = []

    async def answer(request: web.Request, body: Body) -> web.StreamResponse:
        if body["max_tokens"] > 1:  # not the first one
            together.append(asyncio.get_running_loop().create_future())
            if len(together) == 3:
                for each in together:
                    each.set_result(None)
                together.clear()
            else:
                await together[-1]
        return await answer_all(request, body)

    with OpenAIServer(answer) as server:
        code, report = bench(server, "--num-prompts", 12, "--max-concurrency", 3, "--random-input-len", 40)
        assert server.peak == 3
        lengths = [len(body["prompt"]) + 1 for body in server.texts]
    assert code == 0
    assert report["requests"] == {"ok": 12, "failed": 0, "broken_off": 0}
    assert report["peak_concurrency"] == 3
    assert set(lengths) <= {39, 40}, "no word has one token"
    assert (report["input_tokens"], report["output_tokens"]) == (sum(lengths), 12 * 64)
    assert report["tokens_counted_by"] == "server"
    assert report["late_ms"]["max"] == 0
    assert report["model"] == MODEL


def test_slow_answers_do_not_delay_an_open_loop(bench: Bench) -> None:
    """The first answer waits until all requests are there."""
    count = 20
    arrived = 0
    everybody = asyncio.Event()

    async def answer(request: web.Request, body: Body) -> web.StreamResponse:
        nonlocal arrived
        if body["max_tokens"] > 1:
            arrived += 1
            if arrived == count:
                everybody.set()
            await everybody.wait()
        return await answer_all(request, body)

    with OpenAIServer(answer) as server:
        code, report = bench(server, "--num-prompts", count, "--request-rate", 200, "--burstiness", 0.5)
    assert code == 0
    assert report["peak_concurrency"] == count
    assert report["late_ms"]["max"] > 0


def test_bodies_of_requests(bench: Bench) -> None:
    flags = ["--num-prompts", 4, "--token-ids", "--vocab-size", 9, "--length-mix", "5:2,7:3", "--shared-prefix-len", 3]
    with OpenAIServer() as server:
        code, report = bench(server, *flags, "--ignore-eos", "--temperature", 0.5, "--seed", 4)
        bodies = server.texts
    assert code == 0
    for body in bodies:
        assert (len(body["prompt"]), body["max_tokens"]) in {(8, 2), (10, 3)}
        assert all(4 <= token < 9 for token in body["prompt"])
        assert (body["model"], body["ignore_eos"], body["temperature"]) == (MODEL, True, 0.5)
        assert (body["stream"], body["stream_options"]) == (True, {"include_usage": True})
    assert len({tuple(body["prompt"][:3]) for body in bodies}) == 1
    assert report["output_tokens"] == sum(body["max_tokens"] for body in bodies)


def test_chat(bench: Bench) -> None:
    with OpenAIServer() as server:
        code, report = bench(server, "--num-prompts", 2, "--endpoint", "chat", "--random-output-len", 3)
        (message,) = server.texts[0]["messages"]
    assert code == 0
    assert message["role"] == "user"
    assert report["output_tokens"] == 6


def test_without_a_tokenizer(bench: Bench) -> None:
    """The cost of a word follows from the tokens that the server counted in the first prompt."""
    with OpenAIServer(tokenize=False) as server:
        code, report = bench(server, "--num-prompts", 20, "--random-input-len", 200)
    assert code == 0
    assert report["input_tokens"] == pytest.approx(20 * 200, rel=0.1)


def test_chunks_are_counted_if_the_server_does_not_count_tokens(bench: Bench) -> None:
    async def answer(request: web.Request, body: Body) -> web.StreamResponse:
        response = await begin(request)
        await response.write(chunk("ab") + chunk("cd", "stop"))
        return response

    with OpenAIServer(answer) as server:
        code, report = bench(server, "--num-prompts", 3)
    assert (code, report["output_tokens"], report["tokens_counted_by"]) == (0, 6, "chunks")


def test_measured_times(bench: Bench) -> None:
    """They are at least as long as the server waits; the rest depends on the load of the machine."""

    async def answer(request: web.Request, body: Body) -> web.StreamResponse:
        response = await begin(request)
        await asyncio.sleep(0.1)
        await response.write(chunk("a"))
        await asyncio.sleep(0.2)
        await response.write(chunk("bc", "stop") + usage(body, 3))
        return response

    with OpenAIServer(answer) as server:
        code, report = bench(server, "--num-prompts", 2, "--slo", "ttft:50", "--percentiles", "0,25")
    assert code == 0
    slack = 5  # ms, since the first chunk may have been read late, which shortens the gap after it
    assert report["ttft_ms"]["p0"] >= 99
    assert report["e2e_ms"]["p0"] >= 299
    assert report["itl_ms"]["max"] >= 200 - slack
    assert report["tpot_ms"]["max"] == pytest.approx(report["itl_ms"]["max"] / 2)
    assert report["goodput"] == {"slo_ms": {"ttft": 50.0}, "requests_per_s": 0.0, "share": 0.0}


def test_failures_are_counted(bench: Bench, tmp_path: Path) -> None:
    """They are counted by kind, and none ends the run."""
    number = -2  # the first one is not measured

    async def answer(request: web.Request, body: Body) -> web.StreamResponse:
        nonlocal number
        number += 1
        if number == 0:
            return error(500, "out of luck")
        if number == 1:
            return error(429, "too many")
        if number in {2, 3, 4, 5}:
            response = await begin(request)
            await response.write(chunk("a"))
            if number == 2:
                return response  # without an end
            if number == 3:
                await response.write(event({"error": {"message": "rank 1 died"}}))
                return response
            if number == 4:
                assert request.transport is not None
                request.transport.abort()
            await asyncio.Event().wait()
        return await answer_all(request, body)

    log = tmp_path / "log.jsonl"
    with OpenAIServer(answer) as server:
        flags = ["--num-prompts", 8, "--max-concurrency", 1, "--timeout", 2, "--request-log-out", log]
        code, report = bench(server, *flags)
    assert code == 1
    assert report["requests"] == {"ok": 2, "failed": 6, "broken_off": 0}
    assert {kind: each["count"] for kind, each in report["errors"].items()} == {
        "HTTP 500": 1,
        "HTTP 429": 1,
        "broken stream": 1,
        "error in stream": 1,
        "connection lost": 1,
        "timeout": 1,
    }
    assert report["errors"]["HTTP 500"]["example"] == "out of luck"
    assert report["errors"]["error in stream"]["example"] == "rank 1 died"
    assert report["errors"]["timeout"]["example"] == "not complete after 2 s and 1 chunks"
    assert "HTTP 500: out of luck" in {json.loads(line)["error"] for line in log.read_text().splitlines()}


def test_a_log_is_replayed(bench: Bench, tmp_path: Path) -> None:
    first, second = tmp_path / "first.jsonl", tmp_path / "second.jsonl"
    with OpenAIServer() as server:
        flags = ["--num-prompts", 10, "--request-rate", 100, "--random-range-ratio", 0.5]
        assert bench(server, *flags, "--request-log-out", first)[0] == 0
        bodies = server.texts
        server.bodies = []
        assert bench(server, "--request-log-in", first, "--request-log-out", second)[0] == 0

        def sent(bodies: list[Body]) -> list[tuple[str, int]]:
            return sorted((body["prompt"], body["max_tokens"]) for body in bodies)

        assert sent(server.texts) == sent(bodies)

    def times_in(path: Path) -> list[float]:
        times = sorted(json.loads(line)["arrival_s"] for line in path.read_text().splitlines())
        return [time - times[0] for time in times]

    assert len(times_in(first)) == 10
    assert times_in(second) == pytest.approx(times_in(first))


def test_warm_up_is_not_measured(bench: Bench) -> None:
    with OpenAIServer() as server:
        _, report = bench(server, "--num-prompts", 3, "--warmup", 2)
        prompts = [body["prompt"] for body in server.texts]
    assert report["requests"]["ok"] == 3
    assert len(prompts) == len(set(prompts)) == 5


def test_files_and_table(shoal: Shoal, capsys: Capture, tmp_path: Path) -> None:
    output, picture = tmp_path / "report.json", tmp_path / "picture.svg"
    with OpenAIServer(key="secret") as server:
        flags = ["--num-prompts", 3, "--api-key", "secret", "--output", output, "--plot", picture, "--slo", "e2e:60000"]
        assert shoal("bench", "serve", server.url + "/v1", *flags) == 0
    out = capsys.readouterr().out
    assert out.startswith("3 requests ok, 0 failed in ")
    assert "100.0% within e2e 60000 ms" in out
    report = json.loads(output.read_text())
    assert report["requests"]["ok"] == 3
    assert "secret" not in output.read_text()
    assert picture.read_text().startswith("<?xml")


def refused(shoal: Shoal, capsys: Capture, *arguments: object) -> str:
    assert shoal("bench", "serve", *arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert len(err.splitlines()) == 1
    return err


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--length-mix", "5"], "'5' is not a mix of lengths"),
        (["--length-mix", "5:5", "--random-input-len", 5], "leave out --random-input-len"),
        (["--slo", "ttft"], "--slo 'ttft' is not a limit"),
        (["--slo", "x:5"], "NAME is ttft, tpot, e2e"),
        (["--slo", "ttft:nan"], "is not a limit"),
        (["--percentiles", "50,x"], "--percentiles has 'x'"),
        (["--percentiles", "101"], "--percentiles has '101'"),
        (["--request-rate", "nan"], "--request-rate nan"),
        (["--request-rate", "0"], "0.0 is not in the range"),
        (["--timeout", "inf"], "--timeout inf"),
        (["--duration", "5"], "add --request-rate, --max-concurrency or --num-prompts"),
        (["--token-ids", "--endpoint", "chat"], "--token-ids needs --endpoint completions"),
        (["--plot", "x.bmp"], "--plot x.bmp must end with"),
        (["--output", "/nowhere/x"], "--output /nowhere/x can't be written"),
        (["--request-log-in", "/nowhere/x"], "can't be read: No such file"),
    ],
)
def test_bad_flags(shoal: Shoal, capsys: Capture, flags: list[object], said: str) -> None:
    assert said in refused(shoal, capsys, "http://127.0.0.1:1", *flags)


def test_bad_addresses(shoal: Shoal, capsys: Capture) -> None:
    assert "is not the address of a server" in refused(shoal, capsys, "ftp://x")
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        assert refused(shoal, capsys, url) == f"error: no server at {url}: connection refused\n"


def test_a_server_without_a_list_of_models(shoal: Shoal, capsys: Capture) -> None:
    with OpenAIServer(models=False) as server:
        assert "has no list of models: give the model's name with --model" in refused(shoal, capsys, server.url)
        assert shoal("bench", "serve", server.url, "--model", "any", "--num-prompts", 1) == 0
        assert server.texts[0]["model"] == "any"


def test_a_log_on_a_full_disk(shoal: Shoal, capsys: Capture) -> None:
    with OpenAIServer() as server:
        said = refused(shoal, capsys, server.url, "--num-prompts", 99, "--request-log-out", "/dev/full")
    assert said == "error: --request-log-out /dev/full can't be written: No space left on device\n"


def test_a_log_with_token_ids_is_refused_for_a_chat(shoal: Shoal, capsys: Capture, tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"arrival_s": 0, "prompt": [1], "max_tokens": 1}\n')
    flags = ["--endpoint", "chat", "--request-log-in", log]
    assert "has token ids, which --endpoint chat can't send" in refused(shoal, capsys, "http://127.0.0.1:1", *flags)


def test_duration(bench: Bench) -> None:
    """A closed loop runs until the time is over; an open loop has the arrivals within this time."""
    with OpenAIServer() as server:
        code, closed = bench(server, "--duration", 0.5, "--max-concurrency", 2)
        assert (code, closed["requests"]["failed"]) == (0, 0)
        assert closed["duration_s"] >= 0.5
        code, opened = bench(server, "--duration", 0.5, "--request-rate", 50, "--seed", 1)
    times = itertools.takewhile(lambda time: time <= 0.5, arrivals(50.0, 1.0, 1))
    assert opened["requests"]["ok"] == len(list(times))


def test_refusals_of_the_server(shoal: Shoal, capsys: Capture) -> None:
    async def unwilling(request: web.Request, body: Body) -> web.StreamResponse:
        return error(404, "no such model")

    with OpenAIServer(unwilling, key="k", max_model_len=100) as server:
        assert "answers 401: a key is wanted" in refused(shoal, capsys, server.url)
        key = [server.url, "--api-key", "k"]
        assert "has no model 'x'; it serves fake" in refused(shoal, capsys, *key, "--model", "x")
        assert "up to 192 tokens with their outputs, but the model takes at most 100" in refused(shoal, capsys, *key)
        short = ["--random-input-len", 9, "--random-output-len", 9]
        assert "fails a first request: HTTP 404: no such model" in refused(shoal, capsys, *key, *short)


@pytest.mark.slow
def test_ctrl_c_reports_the_ended_requests(tmp_path: Path) -> None:
    """The signal comes when two requests were answered; the others never are."""
    stuck = threading.Event()
    count = 0

    async def answer(request: web.Request, body: Body) -> web.StreamResponse:
        nonlocal count
        count += 1
        if count > 3:
            stuck.set()
            await asyncio.Event().wait()
        return await answer_all(request, body)

    output = tmp_path / "report.json"
    with OpenAIServer(answer) as server:
        flags = ["--max-concurrency", "1", "--num-prompts", "9", "--output", str(output)]
        command = [sys.executable, "-m", "shoal", "bench", "serve", server.url, *flags]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert stuck.wait(100)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert out.startswith("2 requests ok, 0 failed, 1 broken off in ")
    assert err == "interrupted: the report covers the requests that had ended\n"
    assert json.loads(output.read_text())["interrupted"] is True
