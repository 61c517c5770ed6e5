"""Fakes of ranks and of time, and other parts that tests of the engine share."""

import threading
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

import msgspec
from hypothesis import HealthCheck, settings

from shoal.engine.lockstep.member import SharedProgress
from shoal.errors import EngineError, RankFailed, RanksDied
from shoal.protocols import Executor
from shoal.wire.base import encode
from shoal.wire.engine import EngineRequest, Finish, SeqUpdate
from shoal.wire.lockstep import LockstepState
from shoal.wire.ranks import NewSeq, RankStats, Sampling, SeqOut, StepMask, StepPlan, StepResult, StepTimes, Work
from shoal.wire.tokens import decode_tokens, encode_tokens, token_set
from shoal.wire.traffic import Traffic

T = TypeVar("T")
VOCABULARY = 7

# Settings that give the same examples in every run, on machines of any speed.
steady = settings(derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def next_token(tokens: Sequence[int]) -> int:
    """Return the token that every fake model draws after these tokens."""
    return zlib.crc32(encode_tokens(list(tokens))) % VOCABULARY


def request(
    seq: int,
    prompt: Sequence[int],
    max_tokens: int = 4,
    *,
    stop_ids: Sequence[int] = (),
    priority: int = 0,
    deadline: float | None = None,
    salt: str = "",
    group: int = -1,
) -> EngineRequest:
    """Return a request. Its seed is made from the salt, so that ranks know the salt: see `FakeExecutor.origin`."""
    return EngineRequest(
        seq,
        encode_tokens(list(prompt)),
        len(prompt),
        Sampling(seed=zlib.crc32(salt.encode())),
        max_tokens,
        encode_tokens(stop_ids),
        priority,
        deadline,
        salt,
        group=group,
    )


def begun(spec: EngineRequest, count: int) -> EngineRequest:
    """Return the request as another engine continues it, after the first `count` tokens of its output."""
    return msgspec.structs.replace(spec, tokens=spec.tokens + encode_tokens(alone(spec)[:count]))


def prompt_and_output(spec: EngineRequest) -> tuple[list[int], list[int]]:
    """Return the prompt and the output in a request. The output is empty unless another engine began it."""
    tokens = decode_tokens(spec.tokens)
    return tokens[: spec.num_prompt_tokens], tokens[spec.num_prompt_tokens :]


def alone(spec: EngineRequest) -> list[int]:
    """Return the output of a request that runs alone and is not aborted, with the tokens that it comes with."""
    prompt, out = prompt_and_output(spec)
    while len(out) < spec.max_tokens and not (out and out[-1] in token_set(spec.stop_ids)):
        out.append(next_token(prompt + out))
    return out


class Outcomes:
    """The updates that clients got. They are checked as they come: right tokens, one end, and nothing after it."""

    def __init__(self) -> None:
        self.specs: dict[int, EngineRequest] = {}
        self.tokens: dict[int, list[int]] = {}
        self.finished: dict[int, SeqUpdate] = {}
        self.may_abort: set[int] = set()

    def added(self, spec: EngineRequest) -> None:
        self.specs[spec.seq] = spec
        self.tokens[spec.seq] = prompt_and_output(spec)[1]

    @property
    def open(self) -> list[int]:
        return [seq for seq in self.specs if seq not in self.finished]

    def take(self, updates: Sequence[SeqUpdate]) -> None:
        for update in updates:
            seq = update.seq
            assert seq not in self.finished, f"an update of sequence {seq} after its end"
            self.tokens[seq] += update.tokens
            expected = alone(self.specs[seq])
            assert self.tokens[seq] == expected[: len(self.tokens[seq])]
            if update.finish is None:
                assert update.tokens
                assert len(self.tokens[seq]) < len(expected), f"sequence {seq} should have ended"
                continue
            self.finished[seq] = update
            if update.finish is Finish.ABORT:
                assert seq in self.may_abort, f"sequence {seq} was not aborted by the test"
            else:
                stopped = expected[-1] in token_set(self.specs[seq].stop_ids)
                assert self.tokens[seq] == expected
                assert update.finish is (Finish.STOP if stopped else Finish.LENGTH)


class FakeClock:
    """A clock whose time passes only by `tick` seconds with each reading, and as tests set it."""

    def __init__(self, tick: float = 0.0) -> None:
        self.now = 1000.0
        self._tick = tick

    def __call__(self) -> float:
        self.now += self._tick
        return self.now


@dataclass(slots=True)
class _Sequence:
    epoch: int
    tokens: list[int]
    blocks: list[int]
    computed: int
    shared: int  # positions before this one were cached, and are not written again
    contents: list["_Content"] = field(default_factory=list)  # the expected content of its cache, by position
    asked_for: int = 0  # blocks that its tokens and drafts need


# The keys and values of a token depend on the token, on its position and on all tokens before it.
_Content = tuple[int, int, int]


class FakeExecutor:
    """Computes at once in a simulated KV cache, and fails if real ranks could not run a plan correctly.

    Each poll returns one result.

    Args:
        origin: something that the keys of a sequence depend on, besides its tokens.
        stages: a plan must not make the first stage wait for a token while it could compute other sequences.
    """

    def __init__(
        self,
        num_blocks: int = 16,
        block_size: int = 4,
        *,
        max_num_seqs: int = 8,
        max_num_batched_tokens: int = 64,
        origin: Callable[[NewSeq], int] = lambda new: new.sampling.seed,
        lookahead: int = 0,
        window: int | None = None,
        stages: int = 1,
    ) -> None:
        self.num_blocks = num_blocks
        self.start_times = {"load": 0.25}
        self.plans: list[StepPlan] = []
        self.masks: list[StepMask] = []
        self.most_in_flight = 0
        self.closed = 0
        self.incarnation = 0  # of the last reform
        self.missing: set[str] = set()  # parts of its memory that were freed
        self.refuses = ""  # why they can't be allocated again
        self._block_size = block_size
        self._max_num_seqs = max_num_seqs
        self._max_num_batched_tokens = max_num_batched_tokens
        self._origin = origin
        self._lookahead = lookahead
        self._window = window
        self._stages = stages
        self._drawn: dict[int, int] = {}  # sequence -> step of its last draw
        self._answered = 0  # steps
        self._cache: list[_Content | None] = [None] * (num_blocks * block_size)
        self._origins: dict[int, int] = {}
        self._sequences: dict[int, _Sequence] = {}
        self._results: deque[StepResult] = deque()

    @property
    def known(self) -> set[int]:
        """The sequences that the ranks remember."""
        return set(self._sequences)

    def launch(self, plan: StepPlan) -> None:
        assert plan.step == len(self.plans)
        assert not self.missing, "a step for ranks that are asleep"
        self._check_turns(plan)
        self.plans.append(plan)
        self._results.append(self._execute(plan))
        self.most_in_flight = max(self.most_in_flight, len(self._results))

    def mask(self, mask: StepMask) -> None:
        assert mask.step == self.plans[-1].step
        self.masks.append(mask)

    def poll(self, timeout: float) -> list[StepResult]:
        if not self._results:
            return []
        self._answered += 1
        return [self._results.popleft()]

    def call(self, verb: str, payload: bytes = b"", *, timeout: float) -> list[bytes]:
        parts = set(payload.decode().split(","))
        match verb:
            case "stats":
                return [
                    encode(RankStats(0, 1, 2, 3, 4, 5, busy_us=7, traffic=(Traffic("tp", "all_reduce", 2, 80, 9),)))
                ]
            case "sleep":
                assert not self._results, "steps are in flight"
                self.missing |= parts
                if "kv_cache" in parts:
                    self._cache = [None] * len(self._cache)
                self._sequences.clear()
            case "wake_up":
                assert parts <= self.missing
                if self.refuses:
                    return [self.refuses.encode()]
                self.missing -= parts
            case _:
                raise AssertionError(f"no rank knows {verb}")
        return [b""]

    def close(self) -> None:
        self.closed += 1

    @property
    def reforming(self) -> bool:
        return False

    def reform(self, incarnation: int, missing: Collection[str]) -> None:
        """Forget all sequences, the content of the cache and the results that were not fetched."""
        self._sequences.clear()
        self._origins.clear()
        self._drawn.clear()
        self._results.clear()
        self._cache = [None] * len(self._cache)
        self._answered = len(self.plans)
        self.missing = set(missing)
        self.incarnation = incarnation

    def fail(self, why: str) -> None:
        self.closed += 1

    def _check_turns(self, plan: StepPlan) -> None:
        """Check that unknown tokens delay only the sequences that need them."""
        early = [
            work.seq
            for work in plan.work
            if plan.step - self._stages < (drawn := self._drawn.get(work.seq, plan.step - self._stages))
            and drawn >= self._answered
        ]
        assert len(early) in (0, len(plan.work)), f"sequences {early} make the others of step {plan.step} wait"
        self._drawn.update({work.seq: plan.step for work in plan.work if work.sample})

    def _execute(self, plan: StepPlan) -> StepResult:
        for seq in plan.released:
            del self._sequences[seq]
        for new in plan.new:
            self._admit(new)
        assert len(self._sequences) <= self._max_num_seqs
        assert sum(work.count for work in plan.work) <= self._max_num_batched_tokens
        assert len({work.seq for work in plan.work}) == len(plan.work), "a sequence twice in a plan"
        for work in plan.work:
            self._sequences[work.seq].blocks += work.blocks
        # In each layer, all keys of a step are written before any are read.
        self._check_writes(plan)
        for work in plan.work:
            self._write(work)
        for work in plan.work:
            self._read(work)
        out = tuple(self._sample(work) for work in plan.work if work.sample)
        return StepResult(plan.incarnation, plan.step, out, StepTimes(20, 10))

    def _admit(self, new: NewSeq) -> None:
        assert new.seq not in self._sequences
        tokens, cached = decode_tokens(new.tokens), len(new.blocks) * self._block_size
        assert cached <= len(tokens)
        assert 0 < new.num_prompt_tokens <= len(tokens)
        computed = min(cached, len(tokens) - 1)
        self._sequences[new.seq] = _Sequence(new.epoch, tokens, list(new.blocks), computed, cached)
        self._sequences[new.seq].asked_for = len(new.blocks)
        self._origins[new.seq] = self._origin(new)

    def _check_writes(self, plan: StepPlan) -> None:
        holders = Counter(block for sequence in self._sequences.values() for block in self._needed(sequence))
        # A new sequence may read blocks that this step writes.
        holders.subtract(block for new in plan.new for block in self._found(new))
        for work in plan.work:
            sequence, size = self._sequences[work.seq], self._block_size
            stop = work.start + work.count
            assert work.count > 0
            assert work.start == sequence.computed
            known = stop - len(work.drafts)
            assert known > work.start
            assert known <= len(sequence.tokens), "tokens that are not known yet"
            assert work.sample == (known == len(sequence.tokens))
            assert work.sample or not work.drafts
            ahead = self._lookahead if work.sample else 0
            sequence.asked_for = max(sequence.asked_for, -(-(stop + ahead) // size))
            assert -(-stop // size) <= len(sequence.blocks) <= sequence.asked_for, "the block table does not fit"
            written = sequence.blocks[max(work.start, sequence.shared) // size :]
            assert all(holders[block] == 1 for block in written), "a written block is held by another sequence, too"
            needed = self._needed(sequence)
            assert len(set(needed)) == len(needed)

    def _needed(self, sequence: _Sequence) -> list[int]:
        """Return its blocks, without those that no query will look at again."""
        first_seen = 0 if self._window is None else max(sequence.computed - self._window + 1, 0)
        return sequence.blocks[first_seen // self._block_size :]

    def _found(self, new: NewSeq) -> list[int]:
        """Return the blocks of its prefix that it needs."""
        sequence = self._sequences[new.seq]
        return sequence.blocks[len(sequence.blocks) - len(self._needed(sequence)) : len(new.blocks)]

    def _contents(self, work: Work) -> list[_Content]:
        """Return the expected content of the cache by position, with drafts."""
        sequence = self._sequences[work.seq]
        known = work.start + work.count - len(work.drafts)
        tokens = [*sequence.tokens[:known], *work.drafts]
        contents = sequence.contents[:known]
        for position in range(len(contents), len(tokens)):
            before = contents[-1][2] if contents else self._origins[work.seq]
            contents.append((tokens[position], position, hash((before, tokens[position]))))
        sequence.contents = contents[:known]
        return contents

    def _slot(self, sequence: _Sequence, position: int) -> int:
        block, offset = divmod(position, self._block_size)
        return sequence.blocks[block] * self._block_size + offset

    def _write(self, work: Work) -> None:
        sequence = self._sequences[work.seq]
        contents = self._contents(work)
        for position in range(max(work.start, sequence.shared), work.start + work.count):
            self._cache[self._slot(sequence, position)] = contents[position]
        sequence.computed += work.count

    def _read(self, work: Work) -> None:
        sequence = self._sequences[work.seq]
        first_seen = 0 if self._window is None else max(work.start - self._window + 1, 0)
        for position, content in list(enumerate(self._contents(work)))[first_seen:]:
            found = self._cache[self._slot(sequence, position)]
            assert found == content, f"sequence {work.seq} reads {found} at position {position}, should be {content}"

    def _sample(self, work: Work) -> SeqOut:
        sequence = self._sequences[work.seq]
        drawn: list[int] = []
        for draft in (*work.drafts, None):
            drawn.append(next_token([*sequence.tokens, *drawn]))
            if drawn[-1] != draft:
                break
        sequence.tokens += drawn
        sequence.computed = len(sequence.tokens) - 1
        return SeqOut(work.seq, sequence.epoch, tuple(drawn))


class FakePipeline(FakeExecutor):
    """A pipeline whose stages take `step_cost` for each step with work, and `token_cost` for each of its tokens.

    Time passes only while the engine waits for a result.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        stages: int,
        step_cost: float,
        token_cost: float = 1.0,
        max_num_seqs: int = 64,
        max_num_batched_tokens: int = 2048,
    ) -> None:
        super().__init__(
            num_blocks,
            block_size,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            stages=stages,
        )
        self.now = 0.0
        self.busy = [0.0] * stages
        self._step_cost, self._token_cost = step_cost, token_cost
        self._free = [0.0] * stages  # when each has ended what it was given
        self._token_at: dict[int, float] = {}  # when the last token of a sequence is known
        self._answers: deque[float] = deque()

    @property
    def idle_share(self) -> float:
        """The idle share of the time of all stages, up to now."""
        return 1 - sum(self.busy) / (len(self.busy) * self.now)

    def launch(self, plan: StepPlan) -> None:
        super().launch(plan)
        tokens = sum(work.count for work in plan.work)
        cost = self._step_cost + self._token_cost * tokens if tokens else 0.0
        ready = max([self.now, *(self._token_at.get(work.seq, 0.0) for work in plan.work)])
        for stage, free in enumerate(self._free):
            ready = self._free[stage] = max(ready, free) + cost
            self.busy[stage] += cost
        self._token_at.update({work.seq: ready for work in plan.work if work.sample})
        self._answers.append(ready)

    def poll(self, timeout: float) -> list[StepResult]:
        if self._answers:
            self.now = max(self.now, self._answers.popleft())
        return super().poll(timeout)


class FakeLockstep:
    """The lockstep of replicas in one process. `peers[i]` belongs to replica i."""

    def __init__(self, size: int) -> None:
        self.states = [LockstepState(0)] * size
        self.failure: str = ""
        self.peers = [_LockstepEnd(self, rank) for rank in range(size)]

    @property
    def counts(self) -> list[int]:
        """The number of steps that each replica has launched."""
        return [state.steps for state in self.states]


class _LockstepEnd(SharedProgress):
    def __init__(self, group: FakeLockstep, rank: int) -> None:
        super().__init__(0)
        self._group = group
        self._rank = rank

    def others(self) -> Mapping[int, LockstepState]:
        if self._group.failure:
            raise EngineError(self._group.failure)
        return {rank: state for rank, state in enumerate(self._group.states) if rank != self._rank}

    def tell(self, state: LockstepState) -> None:
        self._group.states[self._rank] = state


class FaultyExecutor:
    """An executor with faults: results that take `delays(step)` polls longer or are lost, or a rank that dies."""

    def __init__(
        self,
        inner: Executor,
        *,
        delays: Mapping[int, int] | Callable[[int], int] = {},  # noqa: B006 (never written)
        drop: int | None = None,
        dies_at: int | Collection[int] | None = None,
        replaceable: bool = False,
    ) -> None:
        """Make the faults.

        Args:
            dies_at: the steps at whose end the rank dies, before the result is there.
            replaceable: True if the rank can be replaced, which takes some polls.
        """
        self.num_blocks = inner.num_blocks
        self.start_times = inner.start_times
        self._inner = inner
        self._delay = delays if callable(delays) else lambda step: delays.get(step, 0)
        self._drop = drop
        self._dies_at = [dies_at] if isinstance(dies_at, int) else list(dies_at or ())
        self._replaceable = replaceable
        self._polls_to_reform = 0
        self._late: deque[StepResult] = deque()
        self._polls_left = 0
        self._dead = -1  # the step after which the rank has died

    def launch(self, plan: StepPlan) -> None:
        self._check_alive()
        assert not self.reforming
        self._inner.launch(plan)

    def mask(self, mask: StepMask) -> None:
        self._check_alive()
        self._inner.mask(mask)

    def poll(self, timeout: float) -> list[StepResult]:
        self._check_alive()
        if self.reforming:
            self._polls_to_reform -= 1
            return []
        for result in self._inner.poll(timeout):
            if not self._late:
                self._polls_left = self._delay(result.step)
            self._late.append(result)
        if not self._late:
            return []
        if self._polls_left > 0:
            self._polls_left -= 1
            return []
        result = self._late.popleft()
        if result.step in self._dies_at:
            self._dead = result.step
        self._check_alive()
        if self._late:
            self._polls_left = self._delay(self._late[0].step)
        return [] if result.step == self._drop else [result]

    def call(self, verb: str, payload: bytes = b"", *, timeout: float) -> list[bytes]:
        self._check_alive()
        return self._inner.call(verb, payload, timeout=timeout)

    def close(self) -> None:
        self._inner.close()

    def kill(self) -> None:
        """Have the rank die now, if it is not dead."""
        self._dead = max(self._dead, 0)

    @property
    def reforming(self) -> bool:
        return self._polls_to_reform > 0

    def reform(self, incarnation: int, missing: Collection[str]) -> None:
        assert self._dead >= 0, "no rank has died"
        self._dead = -1
        self._late.clear()
        self._polls_to_reform = 3
        self._inner.reform(incarnation, missing)

    def fail(self, why: str) -> None:
        self._inner.fail(why)

    def _check_alive(self) -> None:
        if self._dead < 0:
            return
        message = f"rank 0 was killed by SIGKILL after step {self._dead}"
        raise RanksDied(message, [0]) if self._replaceable else RankFailed(message)


def this_rank() -> int:
    """Return the number of the calling rank, if ranks are threads of one process."""
    return int(threading.current_thread().name.removeprefix("shoal-rank-"))


def on_threads(size: int, work: Callable[[int], T]) -> list[T]:
    """Run `work(rank)` on one thread for each rank, all at the same time."""
    together = threading.Barrier(size, timeout=30)

    def run(rank: int) -> T:
        together.wait()
        return work(rank)

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))
