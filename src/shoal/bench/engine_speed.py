"""Measuring the speed of an engine with random prompts."""

import random
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

from shoal.protocols import EngineClient
from shoal.wire.engine import EngineRequest, EngineStats
from shoal.wire.ranks import Sampling
from shoal.wire.tokens import encode_tokens

_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class BatchShape:
    """The size of a batch of requests that arrive together."""

    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """The measured times of one batch. Rates are in tokens per second, times in seconds unless the name has a unit.

    The forward pass is that of the rank that returns tokens, on a pipeline's last stage. With several stages the rest
    of a step's time is mostly the work of other stages, so `control_us_per_step` is None.
    """

    seconds: float
    input_tokens_per_s: float  # prompt tokens / time until every request has its first token
    decode_tokens_per_s: float  # tokens after the first / time after that
    output_tokens_per_s: float  # all output tokens / the whole time
    time_to_first_token_s: float  # median over requests
    time_per_output_token_s: float  # median over requests; the first token does not count
    control_us_per_step: float | None  # the time of a step without its forward pass
    forward_us_per_step: float
    schedule_us_per_step: float  # the engine's part of `control_us_per_step`
    steps: int  # steps of all replicas together
    stage_idle: tuple[float, ...]  # by pipeline stage: share of the time in which its ranks compute nothing, the mean


class SpeedMeter:
    """Runs batches of random prompts. All prompts differ, so that no prefix is found in the cache."""

    def __init__(self, engine: EngineClient, vocab_size: int, *, seed: int = 0, temperature: float = 0.0) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._temperature = temperature
        self._next_seq = 1 << 40  # above the numbers of other clients of the engine

    def run(self, shape: BatchShape) -> MeasuredRun:
        before = self._engine.stats()
        begun = time.perf_counter()
        firsts: dict[int, float] = {}
        lasts: dict[int, float] = {}
        seqs = [self._add(shape) for _ in range(shape.batch_size)]
        while len(lasts) < len(seqs):
            updates = self._engine.updates(_POLL_S)
            now = time.perf_counter() - begun
            for update in updates:
                firsts.setdefault(update.seq, now)
                if update.finish is not None:
                    lasts[update.seq] = now
        seconds = time.perf_counter() - begun
        after = self._engine.stats()

        steps = after.steps - before.steps
        replicas = max(len(after.replicas), 1)  # they compute steps at the same time
        forward_us = (after.step_forward_us - before.step_forward_us) / steps
        all_first = max(firsts.values())
        decoded = shape.batch_size * (shape.output_len - 1)
        idle = stage_idle(before, after, seconds)
        control_us = seconds * 1e6 * replicas / steps - forward_us
        per_token = [(lasts[seq] - firsts[seq]) / max(shape.output_len - 1, 1) for seq in seqs]
        return MeasuredRun(
            seconds=seconds,
            input_tokens_per_s=shape.batch_size * shape.input_len / all_first,
            decode_tokens_per_s=decoded / (seconds - all_first) if decoded else 0.0,
            output_tokens_per_s=shape.batch_size * shape.output_len / seconds,
            time_to_first_token_s=statistics.median(firsts.values()),
            time_per_output_token_s=statistics.median(per_token),
            control_us_per_step=control_us if len(idle) == 1 else None,
            forward_us_per_step=forward_us,
            schedule_us_per_step=(after.schedule_us - before.schedule_us) / steps,
            steps=steps,
            stage_idle=idle,
        )

    def _add(self, shape: BatchShape) -> int:
        seq = self._next_seq
        self._next_seq += 1
        tokens = [self._random.randrange(self._vocab_size) for _ in range(shape.input_len)]
        sampling = Sampling(seed=seq, temperature=self._temperature)
        self._engine.add(EngineRequest(seq, encode_tokens(tokens), len(tokens), sampling, max_tokens=shape.output_len))
        return seq


def stage_idle(before: EngineStats, after: EngineStats, seconds: float) -> tuple[float, ...]:
    """Return for each stage the share of these seconds in which its ranks computed nothing, the mean over replicas.

    Ranks that are not in both statistics do not count.
    """
    then = _busy_us(before)
    idle: dict[int, list[float]] = defaultdict(list)
    for key, (stage, busy_us) in _busy_us(after).items():
        if key in then:
            busy = (busy_us - then[key][1]) / (seconds * 1e6)
            idle[stage].append(max(1 - busy, 0.0))  # a step may have begun before these seconds
    return tuple(statistics.mean(idle[stage]) for stage in sorted(idle))


def _busy_us(stats: EngineStats) -> dict[tuple[int, int], tuple[int, int]]:
    """Return {(process, rank): (stage, busy microseconds)} of all ranks.

    Ranks are told apart by their process, since their position among all ranks changes when a replica dies.
    """
    engines = stats.replicas or (stats,)
    return {(rank.pid, rank.rank): (rank.stage, rank.busy_us) for engine in engines for rank in engine.ranks}


def medians(runs: list[MeasuredRun]) -> dict[str, float | list[float] | None]:
    """Return the median of each field, for each stage where a field has a value for each stage."""
    found: dict[str, float | list[float] | None] = {}
    for name in MeasuredRun.__slots__:
        values = [getattr(run, name) for run in runs]
        if isinstance(values[0], tuple):
            found[name] = [statistics.median(each) for each in zip(*values, strict=True)]
        else:
            found[name] = None if None in values else statistics.median(values)
    return found
