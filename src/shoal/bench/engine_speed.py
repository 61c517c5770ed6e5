"""Running made-up requests on an engine and taking the time of what comes back."""

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
class Shape:
    """A batch of requests that arrive together."""

    batch_size: int
    input_len: int
    output_len: int


@dataclass(frozen=True, slots=True)
class MeasuredRun:
    """One batch, measured. Rates in tokens a second, times in seconds unless the name says otherwise.

    The forward pass is that of the rank that answers, on a pipeline's last stage. What else a step takes there is
    mostly the other stages' work: `control_us_per_step` is None where there is more than one.
    """

    seconds: float
    input_tokens_per_s: float  # prompt tokens over the time until every request has its first token
    decode_tokens_per_s: float  # tokens after the first over the time after that
    output_tokens_per_s: float  # all output tokens over all of the time
    time_to_first_token_s: float  # median over requests
    time_per_output_token_s: float  # median over requests, of the tokens after the first
    control_us_per_step: float | None  # all of a step but the forward pass
    forward_us_per_step: float
    schedule_us_per_step: float  # the engine's part of the control cost
    steps: int  # of all replicas together
    stage_idle: tuple[float, ...]  # share of the time in which a pipeline stage computes nothing, the mean of its ranks


class Meter:
    """Sends batches of random prompts; no two alike, so that no prefix is found in the cache."""

    def __init__(self, engine: EngineClient, vocab_size: int, *, seed: int = 0, temperature: float = 0.0) -> None:
        self._engine = engine
        self._vocab_size = vocab_size
        self._random = random.Random(seed)
        self._temperature = temperature
        self._next_seq = 1 << 40  # out of the way of other users of the engine

    def run(self, shape: Shape) -> MeasuredRun:
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
        replicas = max(len(after.replicas), 1)  # which take their steps side by side
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

    def _add(self, shape: Shape) -> int:
        seq = self._next_seq
        self._next_seq += 1
        tokens = [self._random.randrange(self._vocab_size) for _ in range(shape.input_len)]
        sampling = Sampling(seed=seq, temperature=self._temperature)
        self._engine.add(EngineRequest(seq, encode_tokens(tokens), len(tokens), sampling, max_tokens=shape.output_len))
        return seq


def stage_idle(before: EngineStats, after: EngineStats, seconds: float) -> tuple[float, ...]:
    """By stage: the share of these seconds in which its ranks computed nothing, the mean of those of all replicas.

    Ranks that were not there before, or are not any more, do not count.
    """
    then = _busy_us(before)
    idle: dict[int, list[float]] = defaultdict(list)
    for key, (stage, busy_us) in _busy_us(after).items():
        if key in then:
            busy = (busy_us - then[key][1]) / (seconds * 1e6)
            idle[stage].append(max(1 - busy, 0.0))  # a step may have begun before these seconds
    return tuple(statistics.mean(idle[stage]) for stage in sorted(idle))


def _busy_us(stats: EngineStats) -> dict[tuple[int, int], tuple[int, int]]:
    """Stage and time of each rank, by its process and its number in its replica: a set numbers the ranks of those that
    are left anew."""
    engines = stats.replicas or (stats,)
    return {(rank.pid, rank.rank): (rank.stage, rank.busy_us) for engine in engines for rank in engine.ranks}


def medians(runs: list[MeasuredRun]) -> dict[str, float | list[float] | None]:
    """Field by field, and stage by stage."""
    found: dict[str, float | list[float] | None] = {}
    for name in MeasuredRun.__slots__:
        values = [getattr(run, name) for run in runs]
        if isinstance(values[0], tuple):
            found[name] = [statistics.median(each) for each in zip(*values, strict=True)]
        else:
            found[name] = None if None in values else statistics.median(values)
    return found
