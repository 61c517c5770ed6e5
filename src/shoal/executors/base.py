"""The common part of all executors: start phases, the order of messages, deadlines, and the replacement of ranks.

Executors differ only in how they start ranks and exchange messages with them, which is what `Links` do.
"""

import time
from collections import deque
from collections.abc import Callable, Collection, Generator, Sequence
from typing import NoReturn, TypeVar

from shoal.activity import KV_CACHE, WEIGHTS
from shoal.errors import ClosedError, RankFailed, RanksDied, UserError
from shoal.executors.descriptions import describe_compute, describe_load
from shoal.executors.links import Links
from shoal.executors.no_peers import NoPeers
from shoal.executors.step_durations import StepDurations
from shoal.log import get_logger
from shoal.protocols import Peers
from shoal.wire.base import replace_fields
from shoal.wire.ranks import (
    FromRank,
    RankCall,
    RankReply,
    RankReport,
    RankSetup,
    StepMask,
    StepPlan,
    StepResult,
    decode_capacity,
    decode_load_info,
)

log = get_logger("executor")

_SLICE_S = 0.5  # the longest wait for messages before deadlines are checked
_AWAY_S = 5.0  # after this time without a call, the deadlines of steps begin again
_CAUSE_S = 2.0  # how long to wait for another report, if a rank has only lost contact with others
_CAUSE_AMONG_PEERS_S = 10.0  # ... which may belong to another replica: its engine tells of a death or fails before
_PEERS_POLL_S = 0.02  # how often to ask whether the ranks of other replicas are ready

T = TypeVar("T")
# An exchange with the ranks that waits for messages: it yields the most seconds to wait, and is continued after that.
Exchange = Generator[float, None, T]


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
        peers: Peers | None = None,
    ) -> None:
        """Run the start phases on all ranks.

        Args:
            links: the ranks, which have been started.
            setups: the first message for each rank.
            check_capacity: is called with the number of KV blocks, and raises an error if there are too few.
            start_timeout: the most seconds for a start phase.
            step_timeout: the most seconds for a step.
            peers: the replicas with which the ranks form groups; None: there are none.

        Raises:
            UserError: the options, the model and the hardware of a rank do not fit together.
            EngineError: a rank failed.
        """
        self.num_blocks = 0
        self.start_times: dict[str, float] = {}
        self._links = links
        self._peers: Peers = NoPeers() if peers is None else peers
        self._cause_s = _CAUSE_S if peers is None else _CAUSE_AMONG_PEERS_S
        self._setups = list(setups)
        self._incarnation = setups[0].incarnation
        self._start_timeout = start_timeout
        self._step_timeout = step_timeout
        self._replaces_ranks = False  # not while it starts: there is nothing to keep yet
        self._launched: deque[tuple[int, int]] = deque()  # steps that are not answered yet, with their tokens
        self._answered: tuple[int, int] | None = None  # the last answered step: some ranks may still compute it
        self._durations = StepDurations()
        self._waiting_since = 0.0  # when the wait for the first of them began
        self._results: list[StepResult] = []
        self._replies: dict[int, bytes] = {}
        self._call_id = 0
        self._watched = time.monotonic()  # when messages were received last
        self._reform: Exchange[None] | None = None
        self._dead: RanksDied | None = None  # ranks that have died, and are not being replaced yet
        self._failure = ""
        try:
            for setup in setups:
                links.send(setup, setup.rank)
            self._finish(self._start(check_capacity))
        except BaseException:
            links.close(failed=True)
            raise
        self._replaces_ranks = True
        links.keep_spares()

    def _start(self, check_capacity: Callable[[int], None]) -> Exchange[None]:
        times = self.start_times
        yield from self._phase("connect", times)
        yield from self._load(times)
        capacities = [decode_capacity(payload) for payload in (yield from self._phase("profile", times))]
        smallest = min(capacities, key=lambda capacity: capacity.num_blocks)
        self.num_blocks = smallest.num_blocks
        if len({capacity.num_blocks for capacity in capacities}) > 1:
            log.info("rank %d has the least room: all ranks use its %d KV blocks", smallest.rank, self.num_blocks)
        check_capacity(self.num_blocks)
        yield from self._phase("allocate", times, self._block_count)
        yield from self._phase("warm_up", times)

    def _load(self, times: dict[str, float]) -> Exchange[None]:
        answers = yield from self._phase("load", times)
        for setup, info in zip(self._setups, map(decode_load_info, answers), strict=True):
            if not info.weights_kept:
                log.info("%s", describe_load(setup, info))
                log.debug("%s", describe_compute(setup, info))
            if info.rank == 0 and info.comm:
                log.info("rank 0 exchanges tensors: %s", info.comm)

    @property
    def _block_count(self) -> bytes:
        return self.num_blocks.to_bytes(8, "little")

    def _phase(self, verb: str, times: dict[str, float], payload: bytes = b"") -> Exchange[list[bytes]]:
        begun = time.monotonic()
        answers = yield from self._exchange(verb, payload, self._start_timeout)
        times[verb] = time.monotonic() - begun
        return answers

    # --- the replacement of ranks --------------------------------------------------------------------------------

    @property
    def reforming(self) -> bool:
        return self._reform is not None

    def reform(self, incarnation: int, missing: Collection[str]) -> None:
        self._check_usable()
        dead, self._dead = self._dead, None
        self._answered = None
        self._launched.clear()
        self._results.clear()
        self._incarnation = incarnation
        self._setups = [
            replace_fields(setup, incarnation=incarnation, num_blocks=self.num_blocks) for setup in self._setups
        ]
        try:
            self._links.replace(() if dead is None else dead.ranks)
        except RankFailed as error:
            self.fail(str(error))
            raise
        for setup in self._setups:
            self._links.send(setup, setup.rank)
        self._reform = self._form_anew(() if dead is None else dead.ranks, tuple(missing))

    def _form_anew(self, ranks: Sequence[int], missing: Sequence[str]) -> Exchange[None]:
        """Run the start phases again. Those who have survived keep what they have."""
        begun, times = time.monotonic(), dict[str, float]()
        yield from self._phase("connect", times)
        if missing:
            yield from self._phase("sleep", times, ",".join(missing).encode())
        if WEIGHTS not in missing:
            yield from self._load(times)
        if KV_CACHE not in missing:
            yield from self._phase("allocate", times, self._block_count)
        yield from self._await_peers()
        if not missing and self._peers.all_awake:
            yield from self._phase("warm_up", times)
        done = f"{_names(ranks)}: replaced" if ranks else "the ranks have formed their groups anew"
        phases = ", ".join(f"{name} {took:.2f}" for name, took in times.items())
        log.info("%s in %.2f s (%s)", done, time.monotonic() - begun, phases)
        self._links.keep_spares()

    def _await_peers(self) -> Exchange[None]:
        """Wait until the ranks of all replicas are ready: a step before would wait for those that still load."""
        deadline = time.monotonic() + self._start_timeout
        while not self._peers.formed():
            if time.monotonic() > deadline:
                self._raise_failure(f"replicas that share experts were not ready within {self._start_timeout:g} s")
            yield _PEERS_POLL_S

    def _go_on_with_reform(self, timeout: float) -> None:
        """Go on with the replacement of ranks for up to `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while self._reform is not None:
            try:
                wait = next(self._reform)
            except StopIteration:
                self._reform = None
                return
            left = deadline - time.monotonic()
            self._receive(min(max(left, 0.0), wait))
            if left <= 0:
                return

    # --- steps and calls -----------------------------------------------------------------------------------------

    def launch(self, plan: StepPlan) -> None:
        self._check_open()
        if not self._launched:
            self._waiting_since = time.monotonic()
        self._launched.append((plan.step, sum(work.count for work in plan.work)))
        self._links.send(plan)

    def mask(self, mask: StepMask) -> None:
        self._check_open()
        self._links.send(mask)

    def poll(self, timeout: float) -> list[StepResult]:
        self._check_open()
        if self._reform is not None:
            self._go_on_with_reform(timeout)
            return []
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
        while self._reform is not None:
            self._go_on_with_reform(_SLICE_S)
        return self._finish(self._exchange(verb, payload, timeout))

    def _finish(self, exchange: Exchange[T]) -> T:
        while True:
            try:
                wait = next(exchange)
            except StopIteration as end:
                found: T = end.value
                return found
            self._receive(wait)

    def _exchange(self, verb: str, payload: bytes, timeout: float) -> Exchange[list[bytes]]:
        """Have every rank do `verb` after all plans launched so far. Return the answers in the order of the ranks."""
        self._call_id += 1
        self._replies.clear()
        self._links.send(RankCall(self._call_id, verb, payload))
        deadline = time.monotonic() + timeout
        while len(self._replies) < self._links.world_size:
            if time.monotonic() - self._watched > _AWAY_S:  # the caller was: this is no fault of the ranks
                deadline = time.monotonic() + timeout
            if self._launched:  # ranks compute these steps before the call, and steps have their own deadline
                deadline = time.monotonic() + timeout
                self._check_step_deadline()
            elif self._answered:
                self._check_hang(*self._answered)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                missing = [rank for rank in range(self._links.world_size) if rank not in self._replies]
                self._raise_failure(f"{verb} did not finish within {timeout:g} s on {self._describe(missing)}")
            yield min(remaining, _SLICE_S)
        return [self._replies[rank] for rank in range(self._links.world_size)]

    def close(self) -> None:
        self._links.close(failed=self._dead is not None or self._reform is not None)

    def fail(self, why: str) -> None:
        self._failure = self._failure or why
        self._reform = None
        self._links.close(failed=True)

    def _receive(self, timeout: float) -> None:
        now = time.monotonic()
        if now - self._watched > _AWAY_S:
            # The caller was busy, or this process was stopped: do not hold this time against the ranks.
            self._waiting_since = now
        messages = self._guarded_receive(timeout)
        self._watched = time.monotonic()
        reports = self._reports_in(messages)
        if reports:
            self._raise_report(reports)
        self._check_peers()
        for message in messages:
            match message:
                case StepResult() if message.incarnation == self._incarnation:
                    self._answered = self._launched.popleft()
                    self._durations.note(self._answered[1], self._watched - self._waiting_since)
                    self._waiting_since = self._watched
                    self._results.append(message)
                case RankReply() if message.id == self._call_id:
                    self._replies[message.rank] = message.payload

    def _guarded_receive(self, timeout: float) -> list[FromRank]:
        try:
            return self._links.receive(timeout)
        except RankFailed as error:
            self._handle_death(error)

    def _check_peers(self) -> None:
        try:
            self._peers.check()
        except RanksDied as error:
            self._handle_death(error)

    def _handle_death(self, error: RankFailed) -> NoReturn:
        """Raise the error, as `RanksDied` only if the ranks may be replaced. Else this executor has failed."""
        if isinstance(error, RanksDied) and self._replaces_ranks:
            self._dead, self._reform = error, None
            raise error
        self.fail(str(error))
        raise RankFailed(str(error)) from None

    def _reports_in(self, messages: Sequence[FromRank]) -> list[RankReport]:
        """Return the reports of ranks, without those that belong to ranks or groups that were replaced since."""
        return [each for each in messages if isinstance(each, RankReport) and each.incarnation == self._incarnation]

    def _raise_report(self, reports: list[RankReport]) -> NoReturn:
        """Raise the error of the report that is nearest to the cause.

        A rank that has lost contact with others is seldom the one at fault, so other reports are awaited for a moment.
        """
        deadline = time.monotonic() + self._cause_s
        while all(report.communication for report in reports) and (remaining := deadline - time.monotonic()) > 0:
            self._check_peers()  # it raises an error if a rank of another replica has died, ...
            reports += self._reports_in(self._guarded_receive(min(remaining, _PEERS_POLL_S)))  # ... and this of our own
        report = min(reports, key=lambda report: report.communication)
        if report.user_error:
            self.fail(report.error)
            raise UserError(report.error)
        self._raise_failure(f"rank {report.rank} ({self._links.describe(report.rank)}): {report.error}")

    def _check_step_deadline(self) -> None:
        if not self._launched:
            return
        step, tokens = self._launched[0]
        self._check_hang(step, tokens)
        if time.monotonic() - self._waiting_since > self._step_timeout:
            ranks = list(range(self._links.world_size))
            self._raise_failure(
                f"step {step} did not finish within {self._step_timeout:g} s (--step-timeout): {self._describe(ranks)}"
            )

    def _check_hang(self, step: int, tokens: int) -> None:
        limit = self._durations.limit(tokens)
        if time.monotonic() - self._waiting_since > limit and (stuck := self._links.stuck(limit, step)):
            self._raise_hang(step, tokens, stuck)

    def _raise_hang(self, step: int, tokens: int, ranks: Sequence[int]) -> NoReturn:
        """Raise the error of ranks that hang in a step. It is the same as if they had died."""
        longest = self._durations.longest(tokens)
        usual = "" if longest is None else f" (steps like it took {longest:.2f} s at most)"
        others = [rank for rank in range(self._links.world_size) if rank not in ranks]
        wait = "wait" if len(others) > 1 else "waits"
        waiting = f"; {_names(others)} {wait} for that" if others else ""
        hang = f"{self._describe(ranks)} does nothing in step {step}{usual}{waiting}"
        self._handle_death(RanksDied(hang, ranks))

    def _describe(self, ranks: Sequence[int]) -> str:
        return "; ".join(f"rank {rank} ({self._links.describe(rank)})" for rank in ranks)

    def _check_usable(self) -> None:
        if self._failure:
            raise ClosedError(f"the engine has failed: {self._failure}")

    def _check_open(self) -> None:
        self._check_usable()
        if self._dead is not None:
            raise self._dead

    def _raise_failure(self, message: str) -> NoReturn:
        self.fail(message)
        raise RankFailed(message)


def _names(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
