"""Offline requests: prompts in, finished outputs out, as they finish."""

import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from shoal import wire
from shoal.engine.request import encode_tokens
from shoal.frontend.outputs import Answer, Completion
from shoal.frontend.prompts import Job, Refused
from shoal.frontend.tokenizer import Tokenizer
from shoal.protocols import EngineClient
from shoal.types import RequestOutput, SamplingParams

_POLL_S = 1.0
_MOST = 2**31 - 1  # as many as any vocabulary has
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
        self._eos = tuple(eos)
        self._max_model_len = max_model_len
        self._seed = seed
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
        stop_ids = tuple(job.params.stop_token_ids or ()) + (() if job.params.ignore_eos else self._eos)
        first = self._next_seq
        self._next_seq += job.params.n
        completions = [Completion(job, i, self._tokenizer, stop_ids) for i in range(job.params.n)]
        answer = Answer(job, completions, len(completions))
        for i in range(job.params.n):
            self._client.add(self._request(job, first, i, stop_ids))
            run.sequences.add(first + i)
            self._running[first + i] = (run, answer, i)

    def _request(self, job: Job, first: int, index: int, stop_ids: wire.Ids) -> wire.EngineRequest:
        """One of a job's outputs. They have one seed, one prompt and its blocks in common."""
        params = job.params
        return wire.EngineRequest(
            seq=first + index,
            tokens=encode_tokens(list(job.tokens)),
            sampling=self._sampling(job, first, index, stop_ids),
            max_tokens=min(params.max_tokens or _MOST, self._max_model_len - len(job.tokens)),
            stop_ids=stop_ids,
            group=first if params.n > 1 else -1,
            grammar=job.grammar,
        )

    def _sampling(self, job: Job, first: int, index: int, stop_ids: wire.Ids) -> wire.Sampling:
        params = job.params
        return wire.Sampling(
            seed=self._seed_of(first) if params.seed is None else params.seed & 0xFFFFFFFFFFFFFFFF,
            sample_index=index,
            temperature=params.temperature,
            top_k=min(max(params.top_k, 0), _MOST),
            top_p=params.top_p,
            min_p=params.min_p,
            penalties=_penalties(params),
            min_tokens=min(params.min_tokens, _MOST),
            ends=stop_ids if params.min_tokens else (),
            bias=tuple((params.logit_bias or {}).items()),
            allowed=None if params.allowed_token_ids is None else tuple(params.allowed_token_ids),
            banned=job.banned,
            logprobs=_count(params.logprobs),
            prompt_logprobs=_count(params.prompt_logprobs) if index == 0 else -1,
        )

    def _seed_of(self, seq: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}:{seq}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

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
                    run.ended.append((answer.job.index, answer.output(self._tokenizer)))


def _penalties(params: SamplingParams) -> wire.Penalties | None:
    found = wire.Penalties(params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    return None if found == wire.Penalties() else found


def _count(wanted: int | None) -> int:
    """How many of the likeliest tokens: -1 for none, and -1 of the user's for all."""
    if wanted is None:
        return -1
    return _MOST if wanted == -1 else min(wanted, _MOST)


def _refusal(job: Refused) -> RequestOutput:
    return RequestOutput(
        request_id=str(job.index), prompt=job.prompt, prompt_token_ids=job.tokens, outputs=(), error=job.error
    )
