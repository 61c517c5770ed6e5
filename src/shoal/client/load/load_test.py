"""A load test of a server, from the first look at it to the report."""

import asyncio
import itertools
import json
import os
import random
import signal
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.client.http import NotFound, ServerClient
from shoal.client.load.load_run import LoadRun, Requester
from shoal.client.load.outcome import Failure, LoadOutcome
from shoal.client.load.plot import check_plot, plot
from shoal.client.load.progress import RunProgress
from shoal.client.load.prompts import WORDS, IdPrompts, Prompts
from shoal.client.load.report import make_report
from shoal.client.load.request_log import LoggedRequest, log_line, read_log, writing_log
from shoal.client.load.settings import LoadSettings
from shoal.client.load.tokens_per_word import words_by_tokenizer, words_by_usage
from shoal.client.load.workload import PlannedRequest, Workload, arrivals
from shoal.errors import ConfigError, EngineError, UserError
from shoal.process import open_files

_PROBE_IDS = 16


def run_load_test(settings: LoadSettings) -> dict[str, Any]:
    """Run a load test, write the files that the settings name, and return the report.

    Ctrl-C ends the test; then the report covers the requests that have ended, and `interrupted` is true.

    Raises:
        UserError: a file can't be used, or the server refuses a first request.
        EngineError: the first request fails.
    """
    _check_files(settings)
    entries = [] if settings.request_log_in is None else read_log(settings.request_log_in)
    if settings.chat and any(isinstance(entry.prompt, list) for entry in entries):
        raise ConfigError(
            f"--request-log-in {settings.request_log_in} has token ids, which --endpoint chat can't send: use "
            "--endpoint completions"
        )
    open_files.raise_limit()
    return asyncio.run(_measure(settings, entries))


async def _measure(settings: LoadSettings, entries: Sequence[LoggedRequest]) -> dict[str, Any]:
    async with ServerClient(settings.url, api_key=settings.api_key, timeout=settings.timeout) as client:
        model, max_model_len = await _find_model(client, settings.model)
        _check_lengths(settings, entries, max_model_len)
        extra: dict[str, Any] = {"temperature": settings.temperature}
        if settings.ignore_eos:
            extra["ignore_eos"] = True
        requester = Requester(client, chat=settings.chat, model=model, extra=extra)
        prompts = await _prompts(settings, client, requester, model)
        await _warm_up(settings, requester, plan(settings, prompts, entries), prompts)
        requests = plan(settings, prompts, entries)
        bounded = settings.count is not None or settings.paced or bool(entries)
        total = None
        if bounded:  # make all prompts now, so that it takes no time during the run
            made = list(requests)
            total, requests = len(made), iter(made)
        outcomes, run, seconds, complete = await _drive(settings, requester, requests, total)
    report = {
        "benchmark": "serve",
        "model": model,
        "settings": _settings_for_report(settings),
        "interrupted": not complete,
        **make_report(
            outcomes,
            seconds,
            percentiles=settings.percentiles,
            slo=settings.slo,
            peak=run.peak,
            broken_off=run.broken_off,
        ),
    }
    if settings.output is not None:
        _write(settings.output, json.dumps(report, indent=2) + "\n")
    if settings.plot is not None:
        title = f"{model} at {client.url}"
        plot(settings.plot, outcomes, requester.chunks_by_second, duration=seconds, slo=settings.slo, title=title)
    return report


def plan(settings: LoadSettings, prompts: Prompts, entries: Sequence[LoggedRequest]) -> Iterator[PlannedRequest]:
    """Yield the requests in order of arrival. The same settings give the same requests.

    There is no end if the settings have no count, log or times of arrival.
    """
    times: Iterator[float | None]
    if not settings.paced:
        times = itertools.repeat(0.0 if settings.burst else None)
    elif settings.request_rate is None:
        times = (entry.arrival for entry in entries)
    else:
        times = arrivals(settings.request_rate, settings.burstiness, settings.seed)
    duration = settings.duration
    if settings.paced and duration is not None:
        times = itertools.takewhile(lambda time: time is None or time <= duration, times)
    times = itertools.islice(times, settings.count)
    return _replay(entries, times, prompts, settings.seed) if entries else _workload(settings).requests(prompts, times)


def _replay(
    entries: Sequence[LoggedRequest], times: Iterator[float | None], prompts: Prompts, seed: int
) -> Iterator[PlannedRequest]:
    draw = random.Random(f"{seed} texts")
    for index, (entry, arrival) in enumerate(zip(entries, times, strict=False)):
        prompt = prompts.make(entry.prompt_tokens, draw) if entry.prompt is None else entry.prompt
        yield PlannedRequest(index, arrival, prompt, entry.prompt_tokens, entry.max_tokens)


def _workload(settings: LoadSettings) -> Workload:
    return Workload(
        lengths=settings.lengths,
        range_ratio=settings.range_ratio,
        shared_prefix_len=settings.shared_prefix_len,
        num_prefixes=settings.num_prefixes,
        prefix_zipf=settings.prefix_zipf,
        seed=settings.seed,
    )


async def _find_model(client: ServerClient, wanted: str | None) -> tuple[str, int | None]:
    """Return the model's name, and its context length if the server says it."""
    try:
        answer = await client.get_json("/v1/models")
        models = {str(each["id"]): each for each in answer["data"]}
    except NotFound:
        if wanted is None:
            raise UserError(f"{client.url} has no list of models: give the model's name with --model") from None
        return wanted, None
    except (KeyError, TypeError):
        raise UserError(f"{client.url}/v1/models has no list of models: is this the address of the server?") from None
    name = wanted if wanted is not None else next(iter(models), "")
    if name not in models:
        raise UserError(f"{client.url} has no model {name!r}; it serves {', '.join(models) or 'none'}")
    longest = models[name].get("max_model_len")
    return name, longest if isinstance(longest, int) else None


def _check_lengths(settings: LoadSettings, entries: Sequence[LoggedRequest], max_model_len: int | None) -> None:
    if entries:
        longest = max(entry.prompt_tokens + entry.max_tokens for entry in entries)
    else:
        longest = _workload(settings).longest
    if max_model_len is not None and longest > max_model_len:
        raise ConfigError(
            f"requests have up to {longest} tokens with their outputs, but the model takes at most {max_model_len}: "
            "give shorter lengths"
        )


async def _prompts(settings: LoadSettings, client: ServerClient, requester: Requester, model: str) -> Prompts:
    """Return something that makes prompts.

    It sends first requests, to learn how many tokens a word has and to fail early if the server can't answer.
    """
    if settings.token_ids:
        ids = IdPrompts(settings.vocab_size)
        await _first_request(client, requester, PlannedRequest(-1, None, ids.make(_PROBE_IDS, random.Random(0)), 0, 1))
        return ids
    answer = await _first_request(client, requester, PlannedRequest(-1, None, " ".join(WORDS), 0, 1))
    prompts = await words_by_tokenizer(client, model)
    if prompts is not None:
        return prompts
    second = await _first_request(client, requester, PlannedRequest(-1, None, " ".join([*WORDS, *WORDS]), 0, 1))
    if not answer.prompt_tokens or not second.prompt_tokens:  # the server does not count tokens: assume one per word
        return words_by_usage(len(WORDS), 2 * len(WORDS))
    return words_by_usage(answer.prompt_tokens, second.prompt_tokens)


async def _first_request(client: ServerClient, requester: Requester, request: PlannedRequest) -> LoadOutcome:
    outcome = await requester.send(request)
    if outcome.failure is not None:
        raise _failure_error(f"{client.url} fails a first request", outcome.failure)
    return outcome


def _failure_error(what: str, failure: Failure) -> UserError | EngineError:
    """Return the error of a failed request: a UserError if the user can correct it."""
    correctable = failure.kind == "no connection" or failure.kind.startswith("HTTP 4")
    return (UserError if correctable else EngineError)(f"{what}: {failure.kind}: {failure.message}")


async def _warm_up(
    settings: LoadSettings, requester: Requester, requests: Iterator[PlannedRequest], prompts: Prompts
) -> None:
    """Send requests of the same sizes as those of the test, but with other prompts."""
    if not settings.warmup:
        return
    draw = random.Random(f"{settings.seed} warm-up")
    others = (
        PlannedRequest(each.index, None, prompts.make(each.prompt_tokens or _PROBE_IDS, draw), 0, each.max_tokens)
        for each in itertools.islice(requests, settings.warmup)
    )
    outcomes: list[LoadOutcome] = []
    concurrency = settings.max_concurrency or settings.warmup
    await LoadRun(requester, others, outcomes.append, max_concurrency=concurrency).run()
    failures = [each.failure for each in outcomes if each.failure is not None]
    if failures:
        raise _failure_error(f"{len(failures)} of {len(outcomes)} requests of the warm-up failed", failures[0])


async def _drive(
    settings: LoadSettings, requester: Requester, requests: Iterator[PlannedRequest], total: int | None
) -> tuple[list[LoadOutcome], LoadRun, float, bool]:
    """Send the requests. Return the outcomes, the run, its seconds, and whether it was completed."""
    outcomes: list[LoadOutcome] = []
    progress = RunProgress(total)
    with ExitStack() as stack:
        log = None if settings.request_log_out is None else stack.enter_context(writing_log(settings.request_log_out))

        def done(outcome: LoadOutcome) -> None:
            outcomes.append(outcome)
            progress.add(outcome)
            if log is not None:
                log.write(log_line(outcome))

        run = LoadRun(requester, requests, done, max_concurrency=settings.max_concurrency, duration=settings.duration)
        stop = asyncio.Event()
        stack.enter_context(_stopping_by_signal(stop))
        stack.callback(progress.close)
        ticker = asyncio.create_task(_tick(progress, requester, run))
        try:
            complete = await run.run(stop)
        finally:
            ticker.cancel()
        seconds = requester.now() if not complete else max((each.ended for each in outcomes), default=0.0)
    return outcomes, run, seconds, complete


async def _tick(progress: RunProgress, requester: Requester, run: LoadRun) -> None:
    while True:
        await asyncio.sleep(progress.period)
        progress.show(requester.now(), run.running)


@contextmanager
def _stopping_by_signal(stop: asyncio.Event) -> Iterator[None]:
    """Have the first Ctrl-C or SIGTERM set `stop`. The next one does what it did before."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}

    def restore() -> None:
        for number, handler in before.items():
            if loop.remove_signal_handler(number):
                signal.signal(number, handler)

    def first() -> None:
        stop.set()
        restore()

    for number in numbers:
        loop.add_signal_handler(number, first)
    try:
        yield
    finally:
        restore()


def _check_files(settings: LoadSettings) -> None:
    """Check that the output files can be written, before anything expensive happens.

    Raises:
        ConfigError: a file can't be written, or has a wrong name.
    """
    for flag, path in (
        ("--output", settings.output),
        ("--plot", settings.plot),
        ("--request-log-out", settings.request_log_out),
    ):
        if path is not None and not os.access(path if path.exists() else path.parent, os.W_OK):
            raise ConfigError(f"{flag} {path} can't be written: its folder does not exist or you may not write there")
    if settings.plot is not None:
        check_plot(settings.plot)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, "utf-8")
    except OSError as error:
        raise UserError(f"--output {path} can't be written: {error.strerror}") from None


def _settings_for_report(settings: LoadSettings) -> dict[str, Any]:
    """Return the settings for the report: without the key, and with values that JSON can hold."""
    shown = {name: str(value) if isinstance(value, Path) else value for name, value in asdict(settings).items()}
    del shown["api_key"]
    if shown["request_rate"] == float("inf"):
        shown["request_rate"] = "inf"
    return shown
