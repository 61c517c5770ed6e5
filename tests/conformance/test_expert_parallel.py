"""Tests of experts on the ranks of several replicas, which run in lockstep: they give the tokens of one replica."""

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from conformance.test_greedy_tokens import FEW, assert_same, generate
from shoal.comm.threads import ThreadGroups
from shoal.engine.core import EngineCore
from shoal.engine.lockstep.local import LocalLockstep
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.errors import EngineError
from shoal.executors.base import RankExecutor
from shoal.executors.multiprocess import ProcessLinks
from shoal.executors.threads import ThreadLinks
from shoal.models.registry import read_spec
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.base import WIRE_VERSION
from shoal.wire.engine import EngineRequest
from shoal.wire.plan import ReplicaPlace
from shoal.wire.ranks import RankSetup, Sampling, StepPlan
from shoal.wire.tokens import encode_tokens
from support.checkpoints import MAKERS, Reference
from support.fakes import on_threads
from support.plans import engine_plan

pytestmark = pytest.mark.slow

STEPS = 8
TIMEOUT_S = 120.0


@dataclass(frozen=True)
class Layout:
    dp: int = 2
    tp: int = 1
    stages: tuple[int, ...] = ()
    experts: str = "linear"
    all2all: str = "all_to_all"
    budget: int = 64  # tokens in a step


class Replicas:
    """Engines with thread ranks, whose steps the test drives."""

    def __init__(self, engines: Sequence[EngineCore], executors: Sequence[RankExecutor], incarnation: int) -> None:
        self.engines = engines
        self.executors = executors
        self.incarnation = incarnation
        self.tokens: dict[int, list[int]] = {}

    def add(self, replica: int, seq: int, prompt: Sequence[int], max_tokens: int = STEPS) -> None:
        self.tokens[seq] = []
        sampling = Sampling(seed=seq)
        self.engines[replica].add(EngineRequest(seq, encode_tokens(list(prompt)), len(prompt), sampling, max_tokens))

    def run(self, *only: int) -> None:
        """Run all replicas, or only some."""
        driven = [self.engines[replica] for replica in only] or self.engines
        while any(engine.busy for engine in driven):
            for engine in driven:
                for update in engine.updates(0.005):
                    self.tokens[update.seq] += update.tokens
                    assert not update.error

    def traffic(self, replica: int) -> dict[tuple[str, str], int]:
        """Return how many operations the first rank has executed, by axis and name."""
        rank = self.engines[replica].stats().ranks[0]
        return {(each.axis, each.operation): each.count for each in rank.traffic}


@contextmanager
def replicas(folder: Path, layout: Layout, meeting: Rendezvous | None = None) -> Iterator[Replicas]:
    """Return executors with thread ranks, or with process ranks if there is a rendezvous for them."""
    groups = ThreadGroups(TIMEOUT_S)
    locksteps = LocalLockstep.make_all(layout.dp)
    spec = read_spec(folder)
    stages = layout.stages or (spec.num_layers,)
    meeting_address = "" if meeting is None else meeting.address

    def start(replica: int) -> tuple[EngineCore, RankExecutor]:
        place = ReplicaPlace(replica, layout.dp, replica, layout.dp, rendezvous=meeting_address)
        plan = engine_plan(
            folder,
            place,
            tensor_parallel_size=layout.tp,
            pipeline_parallel_size=len(stages),
            pipeline_layer_partition=stages,
            enable_expert_parallel=bool(layout.experts),
            expert_placement_strategy=layout.experts or "linear",
            all2all_backend=layout.all2all or "auto",
            max_model_len=128,
            max_num_seqs=8,
            max_num_batched_tokens=layout.budget,
            max_in_flight=2,
            kv_cache_memory_bytes=2**21,
            start_timeout=TIMEOUT_S,
            step_timeout=TIMEOUT_S,
        )
        lockstep = locksteps[replica]
        setups = [RankSetup(WIRE_VERSION, lockstep.incarnation, rank.rank, plan) for rank in plan.ranks]
        links = ThreadLinks(setups, groups) if meeting is None else ProcessLinks(setups)
        executor = RankExecutor(
            links, setups, check_capacity=lambda _: None, start_timeout=TIMEOUT_S, step_timeout=TIMEOUT_S
        )
        engine = EngineCore(
            executor,
            SchedulerLimits(8, layout.budget, 128, stages=len(stages)),
            block_size=16,
            prefix_caching=True,
            max_in_flight=2,
            incarnation=lockstep.incarnation,
            lockstep=lockstep if layout.dp > 1 else None,
        )
        return engine, executor

    started = on_threads(layout.dp, start)
    with ExitStack() as stack:
        for lockstep in locksteps:
            stack.callback(lockstep.close)
        for engine, _ in started:
            stack.callback(engine.close)
        yield Replicas(
            [engine for engine, _ in started], [executor for _, executor in started], locksteps[0].incarnation
        )


def make_prompts(lengths: Sequence[int]) -> list[list[int]]:
    rng = random.Random(3)
    return [[rng.randrange(3, 250) for _ in range(length)] for length in lengths]


@lru_cache
def expected(folder: Path, prompt: tuple[int, ...]) -> list[int]:
    return Reference(folder).greedy(prompt, STEPS)[0]


LAYOUTS = {
    "dp2": Layout(),
    "dp2-gathered": Layout(all2all="allgather_reducescatter", experts="round_robin"),
    "dp3": Layout(dp=3, experts="round_robin"),
    "dp3-tp2": Layout(dp=3, tp=2),  # there are five experts, so one rank has none
    "dp2-tp2": Layout(tp=2, budget=16),
    "dp2-tp2-gathered": Layout(tp=2, all2all="allgather_reducescatter"),
    "dp2-pp2": Layout(stages=(1, 2)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("mixtral", layout) for layout in LAYOUTS),
        ("qwen2_moe", "dp3"),
        ("qwen2_moe", "dp2-tp2"),
        ("qwen2_moe", "dp2-pp2"),
    ],
)
def test_replicas_with_uneven_work(checkpoint: Callable[[str], Path], name: str, layout: str) -> None:
    """One replica has three prompts, another a short one, and the others none."""
    folder = checkpoint(name)
    prompts = make_prompts([1, 40, 9, 17])
    with replicas(folder, LAYOUTS[layout]) as running:
        for seq, prompt in enumerate(prompts[:3]):
            running.add(0, seq, prompt)
        running.add(1, 3, prompts[3], max_tokens=2)
        running.run()
        steps = [engine.stats().steps for engine in running.engines]
        assert len(set(steps)) == 1  # all are idle after the same number of steps
        running.add(LAYOUTS[layout].dp - 1, 4, prompts[1])  # and they continue together
        running.run()
    for seq in range(3):
        assert running.tokens[seq] == expected(folder, tuple(prompts[seq]))
    assert running.tokens[3] == expected(folder, tuple(prompts[3]))[:2]
    assert running.tokens[4] == expected(folder, tuple(prompts[1]))


MIXTURES = [name for name in sorted(MAKERS) if name.startswith(("mixtral", "granitemoe", "deepseek")) or "moe" in name]
OPTIONS: dict[str, dict[str, Any]] = {
    "tp3": {"tensor_parallel_size": 3},
    "dp2-tp2": {"data_parallel_size": 2, "tensor_parallel_size": 2, "expert_placement_strategy": "round_robin"},
    "dp3-pp2": {"data_parallel_size": 3, "pipeline_parallel_size": 2, "all2all_backend": "all_to_all"},
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every mixture to every layout; without --matrix only two of them to the largest."""
    if "mixture" in metafunc.fixturenames:
        whole = metafunc.config.getoption("--matrix")
        cases = [(name, layout) for name in MIXTURES for layout in OPTIONS]
        large = ("mixtral", "deepseek_v3")
        chosen = [(name, layout) for name, layout in cases if whole or layout != "dp3-pp2" or name in large]
        metafunc.parametrize(("mixture", "options"), chosen)


@pytest.mark.slow
def test_every_mixture(checkpoint: Callable[[str], Path], mixture: str, options: str) -> None:
    folder = checkpoint(mixture)
    whole = {"enable_expert_parallel": True, "distributed_executor_backend": "threads"}
    assert_same(folder, FEW, generate(folder, FEW, steps=STEPS, **whole, **OPTIONS[options]))


def test_process_ranks_meet_at_the_rendezvous(checkpoint: Callable[[str], Path]) -> None:
    folder, prompts = checkpoint("qwen2_moe"), make_prompts([5, 20])
    with Rendezvous() as meeting, replicas(folder, Layout(), meeting) as running:
        for seq, prompt in enumerate(prompts):
            running.add(0, seq, prompt)
        running.run()
    for seq, prompt in enumerate(prompts):
        assert running.tokens[seq] == expected(folder, tuple(prompt))


def test_collectives_of_a_step(checkpoint: Callable[[str], Path]) -> None:
    """Token counts are exchanged once a step; row counts, rows and results once for each of the two mixtures."""
    with replicas(checkpoint("qwen2_moe"), Layout()) as running:
        before = [running.traffic(replica) for replica in (0, 1)]
        running.add(0, 0, make_prompts([5])[0])
        running.run()
        for replica in (0, 1):
            steps, after = running.engines[replica].stats().steps, running.traffic(replica)
            assert steps >= STEPS
            assert after["ep", "all_gather"] - before[replica]["ep", "all_gather"] == steps
            assert after["ep", "all_to_all"] - before[replica]["ep", "all_to_all"] == 2 * 3 * steps


def test_a_replica_that_fails_releases_the_others(checkpoint: Callable[[str], Path]) -> None:
    with replicas(checkpoint("qwen2_moe"), Layout()) as running:
        running.add(1, 0, make_prompts([5])[0])
        running.executors[0].launch(StepPlan(running.incarnation, 0, (), released=(99,)))  # an unknown sequence
        with pytest.raises(EngineError, match="KeyError"):
            running.executors[0].poll(TIMEOUT_S)
        with pytest.raises(EngineError, match="was aborted"):
            running.run(1)


def test_one_replica_has_whole_experts_on_its_own_ranks(checkpoint: Callable[[str], Path]) -> None:
    """No token is sent: there is one all-reduce for each attention, MLP and mixture, and one for the embedding."""
    folder, prompt = checkpoint("qwen2_moe"), make_prompts([9])[0]
    with replicas(folder, Layout(dp=1, tp=3, all2all="")) as running:
        before = running.traffic(0)
        running.add(0, 0, prompt)
        running.run()
        after = running.traffic(0)
        assert {axis for axis, _ in after} == {"tp"}
        assert after["tp", "all_reduce"] - before["tp", "all_reduce"] == STEPS * (1 + 2 * 3)
    assert running.tokens[0] == expected(folder, tuple(prompt))
