"""Offline requests: prompts in, finished outputs out, as they finish."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from shoal.frontend.outputs import Answer
from shoal.frontend.prompts import Job, Refused
from shoal.frontend.requests import Requests
from shoal.frontend.tokenizer import Tokenizer
from shoal.protocols import EngineClient
from shoal.types import RequestOutput

_POLL_S = 1.0
_TAKE, _TAKE_S = 64, 0.05  # jobs taken at a time, and seconds
_WINDOW = 1024  # sequences a replica that are out at a time: enough to keep it busy, few enough for any job's memory


@dataclass(slots=True)
class _Run:
    """One call of `run`: which of its sequences the engine has, and which of its jobs have ended."""

    window: int
    sequences: set[int] = field(default_factory=set)
    ended: deque[tuple[int, RequestOutput]] = field(default_factory=deque)
    order: deque[int] = field(default_factory=deque)  # indices of jobs whose output the caller does not have

    @property
    def has_room(self) -> bool:
        """A result that waits for its turn takes a place too, or one slow job would let the others pile up."""
        return len(self.sequences) < self.window and len(self.order) < self.window


class OfflineRunner:
    """Runs jobs on an engine. Several runs may go on at the same time, on one thread."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        *,
        eos: Sequence[int],
        max_model_len: int,
        seed: int,
        replicas: int = 1,
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._requests = Requests(eos, max_model_len=max_model_len, seed=seed)
        self._window = _WINDOW * replicas
        self._next_seq = 0
        # Of all runs: whoever asks the engine gets everybody's updates. The number is that of the output.
        self._running: dict[int, tuple[_Run, Answer, int]] = {}

    def run(self, jobs: Iterable[Job | Refused], *, ordered: bool = False) -> Iterator[tuple[int, RequestOutput]]:
        """(index, output) of each job as it finishes, or in the order of the jobs if `ordered`.

        Jobs are taken as there is room for them. If the caller stops early, what still runs is aborted.
        """
        run = _Run(self._window)
        source = iter(jobs)
        ready: dict[int, RequestOutput] = {}
        exhausted = False
        try:
            while run.order or not exhausted:
                exhausted = exhausted or self._take(run, source)
                if run.sequences and not run.ended:
                    more = not exhausted and run.has_room
                    self._receive(0 if more else _POLL_S)
                while run.ended:
                    index, output = run.ended.popleft()
                    ready[index] = output
                    while run.order and (first := run.order[0] if ordered else index) in ready:
                        run.order.remove(first)
                        yield first, ready.pop(first)
        finally:
            for seq in run.sequences:
                self._running.pop(seq, None)
            self._client.abort(tuple(run.sequences))

    def _take(self, run: _Run, source: Iterator[Job | Refused]) -> bool:
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

    def _start(self, run: _Run, job: Job | Refused) -> None:
        if isinstance(job, Refused):
            run.ended.append((job.index, _refusal(job)))
            return
        first = self._next_seq
        self._next_seq += job.params.n
        answer = Answer.begun(job, self._tokenizer, self._requests.eos)
        for i, request in enumerate(self._requests.of(job, first)):
            self._client.add(request)
            run.sequences.add(request.seq)
            self._running[request.seq] = (run, answer, i)

    def _receive(self, timeout: float) -> None:
        for update in self._client.updates(timeout):
            found = self._running.get(update.seq)
            if found is None:  # of a run that was given up, or past a stop text
                continue
            run, answer, index = found
            stopped = answer.take(index, update)
            if stopped and update.finish is None:
                self._client.abort((update.seq,))
            if stopped or update.finish is not None:
                del self._running[update.seq]
                run.sequences.discard(update.seq)
                answer.running -= 1
                if answer.running == 0:
                    run.ended.append((answer.job.index, answer.output()))


def _refusal(job: Refused) -> RequestOutput:
    return RequestOutput(
        request_id=str(job.index), prompt=job.prompt, prompt_token_ids=job.tokens, outputs=(), error=job.error
    )
