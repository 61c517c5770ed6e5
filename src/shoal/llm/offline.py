"""Offline requests: prompts in, finished outputs out, as they finish."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from shoal.errors import ClosedError, EngineError
from shoal.llm.outputs import Answer
from shoal.llm.requests import Requests
from shoal.llm.shared_engine import SharedEngine
from shoal.outputs import RequestOutput
from shoal.process.interrupts import interrupts
from shoal.protocols import EngineClient
from shoal.text.prompts import Job, RefusedPrompt
from shoal.text.tokenizer import Tokenizer

_POLL_S = 0.1  # how long Ctrl-C, and other threads, wait for an engine that says nothing
_TAKE, _TAKE_S = 64, 0.05  # jobs taken at a time, and seconds
_WINDOW = 1024  # sequences a replica that are out at a time: enough to keep it busy, few enough for any job's memory


@dataclass(slots=True, eq=False)
class _OfflineRun:
    """One call of `run`: which of its sequences the engine has, and which of its jobs have ended."""

    window: int
    failure: EngineError | None = None  # what another run has heard of the engine that they share
    sequences: set[int] = field(default_factory=set)
    ended: deque[tuple[int, RequestOutput]] = field(default_factory=deque)
    order: deque[int] = field(default_factory=deque)  # indices of jobs whose output the caller does not have

    @property
    def has_room(self) -> bool:
        """A result that waits for its turn takes a place too, or one slow job would let the others pile up."""
        return len(self.sequences) < self.window and len(self.order) < self.window


class OfflineRunner:
    """Runs jobs on an engine. Several runs may go on at the same time, on one thread or on several: they take turns,
    step by step, and share the engine's batches. Each run belongs to one thread at a time, as generators do."""

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
        self._requests = Requests(eos, max_model_len=max_model_len, seed=seed)
        self._window = _WINDOW * replicas
        self._next_seq = 0
        # Of all runs: whoever asks the engine gets everybody's updates. The number is that of the output.
        self._running: dict[int, tuple[_OfflineRun, Answer, int]] = {}
        self._given_up: deque[_OfflineRun] = deque()  # runs whose sequences are still to be aborted

    def run(self, jobs: Iterable[Job | RefusedPrompt], *, ordered: bool = False) -> Iterator[tuple[int, RequestOutput]]:
        """(index, output) of each job as it finishes, or in the order of the jobs if `ordered`.

        Jobs are taken as there is room for them. If the caller stops early, what still runs is aborted. A
        KeyboardInterrupt comes between two steps, and the engine lives.

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
            if not self._engine.is_mine:  # this may be the garbage collector's doing, in the middle of another run
                with suppress(ClosedError), self._engine.turn() as client:
                    self._abort_what_was_given_up(client)

    def _take(self, run: _OfflineRun, source: Iterator[Job | RefusedPrompt]) -> bool:
        """Takes some jobs, as many as there is room for; not all at once, so that the engine computes meanwhile, and
        a slow source keeps nobody waiting. True: there are no more."""
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
            answer = Answer.begun(job, self._tokenizer, self._requests.eos)
            for i, request in enumerate(self._requests.of(job, first)):
                client.add(request)
                run.sequences.add(request.seq)
                self._running[request.seq] = (run, answer, i)

    def _receive(self, run: _OfflineRun, timeout: float) -> None:
        with self._engine.turn() as client:
            self._abort_what_was_given_up(client)
            if run.sequences and not run.ended:  # else another run has received what this one waits for
                self._hand_out(client, run, timeout)
            if interrupts.came:  # before anybody hears of it: the next Ctrl-C may come while this run ends
                self._given_up.append(run)
                self._abort_what_was_given_up(client)
            interrupts.check()

    def _hand_out(self, client: EngineClient, run: _OfflineRun, timeout: float) -> None:
        """What the engine has to say, to whom it concerns."""
        if run.failure is not None:
            raise run.failure
        try:
            updates = client.updates(timeout)
        except EngineError as error:
            for other, _, _ in self._running.values():
                if other is not run and other.failure is None:
                    other.failure = type(error)(str(error))  # whoever asks next would only hear that it has ended
            raise
        for update in updates:
            found = self._running.get(update.seq)
            if found is None:  # of a run that was given up, or past a stop text
                continue
            whose, answer, index = found
            stopped = answer.take(index, update)
            if stopped and update.finish is None:
                client.abort((update.seq,))
            if stopped or update.finish is not None:
                del self._running[update.seq]
                whose.sequences.discard(update.seq)
                answer.running -= 1
                if answer.running == 0:
                    whose.ended.append((answer.job.index, answer.output()))

    def _abort_what_was_given_up(self, client: EngineClient) -> None:
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
