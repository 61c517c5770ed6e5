"""The common part of all executors: start phases, the order of messages, and deadlines.

Executors differ only in how they start ranks and exchange messages with them, which is what `Links` do.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

from shoal.errors import ClosedError, RankFailed, UserError
from shoal.log import get_logger
from shoal.values import format_bytes
from shoal.wire.ranks import (
    FromRank,
    LoadInfo,
    RankCall,
    RankReply,
    RankReport,
    RankSetup,
    StepMask,
    StepPlan,
    StepResult,
    ToRank,
    decode_capacity,
    decode_load_info,
)

log = get_logger("executor")

_SLICE_S = 0.5  # the longest wait for messages before deadlines are checked
_AWAY_S = 5.0  # after this time without a call, the deadlines of steps begin again
_CAUSE_S = 2.0  # how long to wait for another report, if a rank has only lost contact with others


class Links(Protocol):
    """The connections to the ranks of a replica, which start and end them too."""

    world_size: int  # number of ranks

    def send(self, message: ToRank, rank: int | None = None) -> None:
        """Send a message to one rank, or to all. Never blocks, and keeps the order of messages."""

    def receive(self, timeout: float) -> list[FromRank]:
        """Return the messages that have arrived, after waiting up to `timeout` seconds for the first.

        Raises:
            RankFailed: a rank has died or does not answer.
        """

    def describe(self, rank: int) -> str:
        """Return a description of a rank for error messages: its process or thread, and what it was doing last."""

    def close(self, *, failed: bool) -> None:
        """End the ranks, immediately if one has failed. Idempotent, never raises."""


class RankExecutor:
    """An Executor that reaches its ranks over Links."""

    def __init__(
        self,
        links: Links,
        setups: Sequence[RankSetup],
        *,
        check_capacity: Callable[[int], None],
        start_timeout: float,
        step_timeout: float,
    ) -> None:
        """Run the start phases on all ranks.

        Args:
            links: the ranks, which have been started.
            setups: the first message for each rank.
            check_capacity: is called with the number of KV blocks, and raises an error if there are too few.
            start_timeout: the most seconds for a start phase.
            step_timeout: the most seconds for a step.

        Raises:
            UserError: the options, the model and the hardware of a rank do not fit together.
            EngineError: a rank failed.
        """
        self.num_blocks = 0
        self.start_times: dict[str, float] = {}
        self._links = links
        self._step_timeout = step_timeout
        self._launched: deque[int] = deque()  # steps that are not answered yet
        self._waiting_since = 0.0  # when the wait for the first of them began
        self._results: list[StepResult] = []
        self._replies: dict[int, bytes] = {}
        self._call_id = 0
        self._watched = time.monotonic()  # when messages were received last
        self._failure = ""
        try:
            for setup in setups:
                links.send(setup, setup.rank)
            self._start(setups, check_capacity, start_timeout)
        except BaseException:
            links.close(failed=True)
            raise

    def _start(self, setups: Sequence[RankSetup], check_capacity: Callable[[int], None], timeout: float) -> None:
        self._phase("connect", timeout)
        for setup, info in zip(setups, map(decode_load_info, self._phase("load", timeout)), strict=True):
            log.info("%s", _describe_load(setup, info))
            log.debug("%s", _describe_compute(setup, info))
        capacities = [decode_capacity(payload) for payload in self._phase("profile", timeout)]
        smallest = min(capacities, key=lambda capacity: capacity.num_blocks)
        self.num_blocks = smallest.num_blocks
        if len({capacity.num_blocks for capacity in capacities}) > 1:
            log.info("rank %d has the least room: all ranks use its %d KV blocks", smallest.rank, self.num_blocks)
        check_capacity(self.num_blocks)
        self._phase("allocate", timeout, self.num_blocks.to_bytes(8, "little"))
        self._phase("warm_up", timeout)

    def _phase(self, verb: str, timeout: float, payload: bytes = b"") -> list[bytes]:
        begun = time.monotonic()
        answers = self.call(verb, payload, timeout=timeout)
        self.start_times[verb] = time.monotonic() - begun
        return answers

    def launch(self, plan: StepPlan) -> None:
        self._check_open()
        if not self._launched:
            self._waiting_since = time.monotonic()
        self._launched.append(plan.step)
        self._links.send(plan)

    def mask(self, mask: StepMask) -> None:
        self._check_open()
        self._links.send(mask)

    def poll(self, timeout: float) -> list[StepResult]:
        self._check_open()
        deadline = time.monotonic() + timeout
        while not self._results:
            remaining = deadline - time.monotonic()
            self._receive(min(max(remaining, 0), _SLICE_S))
            self._check_step_deadline()
            if remaining <= 0:
                break
        results, self._results = self._results, []
        return results

    def call(self, verb: str, payload: bytes = b"", *, timeout: float) -> list[bytes]:
        self._check_open()
        self._call_id += 1
        self._replies.clear()
        self._links.send(RankCall(self._call_id, verb, payload))
        deadline = time.monotonic() + timeout
        while len(self._replies) < self._links.world_size:
            if self._launched:  # ranks compute these steps before the call, and steps have their own deadline
                deadline = time.monotonic() + timeout
                self._check_step_deadline()
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                missing = [rank for rank in range(self._links.world_size) if rank not in self._replies]
                self._fail(f"{verb} did not finish within {timeout:g} s on {self._describe(missing)}")
            self._receive(min(remaining, _SLICE_S))
        return [self._replies[rank] for rank in range(self._links.world_size)]

    def close(self) -> None:
        self._links.close(failed=False)

    def _receive(self, timeout: float) -> None:
        now = time.monotonic()
        if now - self._watched > _AWAY_S:
            # The caller was busy, or this process was stopped: do not hold this time against the ranks.
            self._waiting_since = now
        messages = self._guarded_receive(timeout)
        self._watched = time.monotonic()
        reports = [message for message in messages if isinstance(message, RankReport)]
        if reports:
            self._raise_report(reports)
        for message in messages:
            match message:
                case StepResult():
                    self._launched.popleft()
                    self._waiting_since = time.monotonic()
                    self._results.append(message)
                case RankReply() if message.id == self._call_id:
                    self._replies[message.rank] = message.payload

    def _guarded_receive(self, timeout: float) -> list[FromRank]:
        try:
            return self._links.receive(timeout)
        except RankFailed as error:
            self._give_up(str(error))
            raise

    def _raise_report(self, reports: list[RankReport]) -> NoReturn:
        """Raise the error of the report that is nearest to the cause.

        A rank that has lost contact with others is seldom the one at fault, so other reports are awaited for a moment.
        """
        deadline = time.monotonic() + _CAUSE_S
        while all(report.communication for report in reports) and (remaining := deadline - time.monotonic()) > 0:
            found = self._guarded_receive(remaining)  # raises if a rank has died
            reports += [message for message in found if isinstance(message, RankReport)]
        report = min(reports, key=lambda report: report.communication)
        if report.user_error:
            self._give_up(report.error)
            raise UserError(report.error)
        self._fail(f"rank {report.rank} ({self._links.describe(report.rank)}): {report.error}")

    def _check_step_deadline(self) -> None:
        if self._launched and time.monotonic() - self._waiting_since > self._step_timeout:
            ranks = list(range(self._links.world_size))
            self._fail(
                f"step {self._launched[0]} did not finish within {self._step_timeout:g} s (--step-timeout): "
                f"{self._describe(ranks)}"
            )

    def _describe(self, ranks: Sequence[int]) -> str:
        return "; ".join(f"rank {rank} ({self._links.describe(rank)})" for rank in ranks)

    def _check_open(self) -> None:
        if self._failure:
            raise ClosedError(f"the engine has failed: {self._failure}")

    def _give_up(self, why: str) -> None:
        self._failure = why
        self._links.close(failed=True)

    def _fail(self, message: str) -> NoReturn:
        self._give_up(message)
        raise RankFailed(message)


def _describe_load(setup: RankSetup, info: LoadInfo) -> str:
    """Return a line for the log: the place of a rank in the layout, and what it holds."""
    layout = setup.plan.layout
    stage, tp_rank = divmod(setup.rank, layout.tp)
    experts = f"{info.experts} experts, " if info.experts else ""
    return (
        f"rank {setup.rank}: stage {stage} of {layout.num_stages}, tp {tp_rank} of {layout.tp}, layers "
        f"{info.first_layer}-{info.first_layer + info.layers - 1}, {info.q_heads} query and {info.kv_heads} KV heads, "
        f"{experts}{format_bytes(info.weight_bytes)} of weights on {info.device}"
    )


def _describe_compute(setup: RankSetup, info: LoadInfo) -> str:
    """Return a line for the debug log: how a rank computes."""
    return (
        f"rank {setup.rank}: {setup.rank_plan.cost_share:.1%} of the cost, {info.threads} threads, {info.linear}, "
        f"{info.kernels}, {info.comm}"
    )
