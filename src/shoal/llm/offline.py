"""The runner of offline requests: it takes prompts and gives their outputs as they finish."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from shoal.errors import ClosedError, EngineError
from shoal.llm.outputs import PromptOutputs
from shoal.llm.request_builder import RequestBuilder
from shoal.llm.shared_engine import SharedEngine
from shoal.outputs import RequestOutput
from shoal.process.interrupts import interrupts
from shoal.protocols import EngineClient
from shoal.text.prompts import Job, RefusedPrompt
from shoal.text.tokenizer import Tokenizer

_POLL_S = 0.1  # how long Ctrl-C and other threads may have to wait while the engine has no updates
_TAKE, _TAKE_S = 64, 0.05  # the most jobs that are taken at a time, and the most seconds that this may last
# The most unfinished sequences for each replica: enough to keep it busy, and so few that jobs of any size fit into
# memory.
_WINDOW = 1024


@dataclass(slots=True, eq=False)
class _OfflineRun:
    """The state of one call of `run`."""

    window: int  # the most sequences, and the most jobs, that may be unfinished at a time
    failure: EngineError | None = None  # the failure of the engine, if another run has got it
    sequences: set[int] = field(default_factory=set)  # those that the engine has
    ended: deque[tuple[int, RequestOutput]] = field(default_factory=deque)  # index and output of jobs that have ended
    order: deque[int] = field(default_factory=deque)  # the indices of jobs whose output the caller does not have yet

    @property
    def has_room(self) -> bool:
        """True if another job may be taken.

        Outputs that wait for the caller count too; otherwise they would pile up behind one slow job if order matters.
        """
        return len(self.sequences) < self.window and len(self.order) < self.window


class OfflineRunner:
    """A runner of jobs on one engine.

    Several runs may go on at the same time, in one thread or in several. They take turns, step by step, and share the
    engine's batches. A run, like any generator, may be used by one thread at a time.
    """

    def __init__(
        self,
        engine: SharedEngine,
        tokenizer: Tokenizer | None,
        *,
        eos: Sequence[int],
        max_model_len: int,
        seed: int,
        replicas: int = 1,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._requests = RequestBuilder(eos, max_model_len=max_model_len, seed=seed)
        self._window = _WINDOW * replicas
        self._next_seq = 0
        # Sequence -> its run, the outputs of its prompt, and its number among them. All runs share it, because the run
        # that asks the engine gets the updates of all runs.
        self._running: dict[int, tuple[_OfflineRun, PromptOutputs, int]] = {}
        self._given_up: deque[_OfflineRun] = deque()  # runs whose sequences have yet to be aborted

    def run(self, jobs: Iterable[Job | RefusedPrompt], *, ordered: bool = False) -> Iterator[tuple[int, RequestOutput]]:
        """Yield the index and the output of each job, as they finish or, if `ordered`, in the order of the jobs.

        Jobs are taken when there is room for them. If the caller stops early, unfinished requests are aborted. A
        KeyboardInterrupt is raised between two steps, and the engine can be used afterwards.

        Raises:
            EngineError: the engine failed, or was closed, perhaps by another thread.
        """
        self._engine.check()
        run = _OfflineRun(self._window)
        source = iter(jobs)
        ready: dict[int, RequestOutput] = {}
        exhausted = False
        try:
            while run.order or not exhausted:
                exhausted = exhausted or self._take(run, source)
                if run.sequences and not run.ended:
                    more = not exhausted and run.has_room
                    self._receive(run, 0 if more else _POLL_S)
                while run.ended:
                    index, output = run.ended.popleft()
                    ready[index] = output
                    while run.order and (first := run.order[0] if ordered else index) in ready:
                        run.order.remove(first)
                        yield first, ready.pop(first)
        finally:
            self._given_up.append(run)
            # The garbage collector may close this generator while the same thread has its turn in another run. That run
            # then aborts the sequences.
            if not self._engine.is_mine:
                with suppress(ClosedError), self._engine.turn() as client:
                    self._abort_given_up_runs(client)

    def _take(self, run: _OfflineRun, source: Iterator[Job | RefusedPrompt]) -> bool:
        """Take jobs while there is room for them. Return True if there are no more.

        Only some are taken at a time, so that the engine can compute in between, even if the source is slow.
        """
        until = time.monotonic() + _TAKE_S
        for _ in range(_TAKE):
            if not run.has_room:
                return False
            job = next(source, None)
            if job is None:
                return True
            run.order.append(job.index)
            self._start(run, job)
            if time.monotonic() > until:
                return False
        return False

    def _start(self, run: _OfflineRun, job: Job | RefusedPrompt) -> None:
        if isinstance(job, RefusedPrompt):
            run.ended.append((job.index, _refusal(job)))
            return
        with self._engine.turn() as client:
            first = self._next_seq
            self._next_seq += job.params.n
            outputs = PromptOutputs.begin(job, self._tokenizer, self._requests.eos)
            for i, request in enumerate(self._requests.build(job, first)):
                client.add(request)
                run.sequences.add(request.seq)
                self._running[request.seq] = (run, outputs, i)

    def _receive(self, run: _OfflineRun, timeout: float) -> None:
        with self._engine.turn() as client:
            self._abort_given_up_runs(client)
            if run.sequences and not run.ended:  # otherwise another run has received what this one waits for
                self._dispatch_updates(client, run, timeout)
            if interrupts.pending:
                # Abort this run before the KeyboardInterrupt is raised: a second Ctrl-C could prevent it later.
                self._given_up.append(run)
                self._abort_given_up_runs(client)
            interrupts.check()

    def _dispatch_updates(self, client: EngineClient, run: _OfflineRun, timeout: float) -> None:
        """Get the updates of the engine, and add each to the outputs that it belongs to."""
        if run.failure is not None:
            raise run.failure
        try:
            updates = client.updates(timeout)
        except EngineError as error:
            for other, _, _ in self._running.values():
                if other is not run and other.failure is None:
                    # From the engine, the other run would only learn that it has ended, and not why.
                    other.failure = type(error)(str(error))
            raise
        for update in updates:
            found = self._running.get(update.seq)
            if found is None:  # its run was given up, or its output has ended at a stop text
                continue
            owner, outputs, index = found
            stopped = outputs.take(index, update)
            if stopped and update.finish is None:
                client.abort((update.seq,))
            if stopped or update.finish is not None:
                del self._running[update.seq]
                owner.sequences.discard(update.seq)
                outputs.running -= 1
                if outputs.running == 0:
                    owner.ended.append((outputs.job.index, outputs.output()))

    def _abort_given_up_runs(self, client: EngineClient) -> None:
        while self._given_up:
            run = self._given_up.popleft()
            for seq in run.sequences:
                self._running.pop(seq, None)
            client.abort(tuple(run.sequences))
            run.sequences.clear()


def _refusal(job: RefusedPrompt) -> RequestOutput:
    return RequestOutput(
        request_id=str(job.index), prompt=job.prompt, prompt_token_ids=job.tokens, outputs=(), error=job.error
    )
