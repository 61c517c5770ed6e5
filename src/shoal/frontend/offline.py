"""Offline requests: prompts in, finished outputs out, as they finish."""

import hashlib
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from shoal import wire
from shoal.engine.request import encode_tokens
from shoal.frontend.prompts import Job
from shoal.frontend.tokenizer import Tokenizer, continuation
from shoal.protocols import EngineClient
from shoal.types import CompletionOutput, FinishReason, RequestOutput

_POLL_S = 1.0
_MOST = 2**31 - 1  # as many as any vocabulary has
_WINDOW = 1024  # requests that the engine has at a time: enough to keep it busy, few enough for any job's memory
_REASONS: dict[wire.Finish, FinishReason] = {
    wire.Finish.STOP: "stop",
    wire.Finish.LENGTH: "length",
    wire.Finish.ABORT: "abort",
}


@dataclass(slots=True)
class _Running:
    seq: int
    job: Job
    ended: "deque[_Running]"  # of its run: where it goes when it has ended
    last: wire.SeqUpdate | None = None
    tokens: list[int] = field(default_factory=list)
    logprobs: list[wire.TokenLogprobs] = field(default_factory=list)


class OfflineRunner:
    """Runs jobs on an engine. Several runs may go on at the same time, on one thread."""

    def __init__(
        self, client: EngineClient, tokenizer: Tokenizer | None, *, eos: Sequence[int], max_model_len: int, seed: int
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._eos = tuple(eos)
        self._max_model_len = max_model_len
        self._seed = seed
        self._next_seq = 0
        self._running: dict[int, _Running] = {}  # of all runs: whoever asks the engine gets everybody's updates

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[int, RequestOutput]]:
        """(index, output) of each job as it finishes. If the caller stops early, what still runs is aborted."""
        mine: set[int] = set()
        ended: deque[_Running] = deque()
        source = iter(jobs)
        exhausted = False
        try:
            while mine or not exhausted:
                while not exhausted and len(mine) < _WINDOW:
                    job = next(source, None)
                    if job is None:
                        exhausted = True
                    else:
                        mine.add(self._add(job, ended))
                if mine and not ended:
                    self._receive()
                while ended:
                    request = ended.popleft()
                    mine.discard(request.seq)
                    yield request.job.index, self._output(request)
        finally:
            for seq in mine:
                self._running.pop(seq, None)
            self._client.abort(tuple(mine))

    def _add(self, job: Job, ended: "deque[_Running]") -> int:
        seq = self._next_seq
        self._next_seq += 1
        params = job.params
        sampling = wire.Sampling(
            seed=self._seed_of(seq) if params.seed is None else params.seed & 0xFFFFFFFFFFFFFFFF,
            temperature=params.temperature,
            top_k=min(max(params.top_k, 0), _MOST),
            top_p=params.top_p,
            logprobs=-1 if params.logprobs is None else min(params.logprobs, _MOST),
        )
        request = wire.EngineRequest(
            seq=seq,
            tokens=encode_tokens(list(job.tokens)),
            sampling=sampling,
            max_tokens=min(params.max_tokens or _MOST, self._max_model_len - len(job.tokens)),
            stop_ids=params.stop_token_ids + (() if params.ignore_eos else self._eos),
        )
        self._client.add(request)
        self._running[seq] = _Running(seq, job, ended)
        return seq

    def _seed_of(self, seq: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}:{seq}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _receive(self) -> None:
        for update in self._client.updates(_POLL_S):
            request = self._running.get(update.seq)
            if request is None:  # of a run that was given up
                continue
            request.tokens += update.tokens
            request.logprobs += update.logprobs
            if update.finish is not None:
                request.last = update
                del self._running[update.seq]
                request.ended.append(request)

    def _output(self, request: _Running) -> RequestOutput:
        job, tokens, last = request.job, request.tokens, request.last
        finish = _REASONS[last.finish] if last is not None and last.finish is not None else "abort"
        # The token that ends a text is no part of the text, but of the tokens.
        text_tokens = tokens[:-1] if finish == "stop" else tokens
        wanted = job.params.logprobs is not None
        completion = CompletionOutput(
            index=0,
            text=continuation(self._tokenizer, job.tokens, text_tokens) if self._tokenizer else "",
            token_ids=tuple(tokens),
            finish_reason=finish,
            cumulative_logprob=sum(entry.chosen for entry in request.logprobs) if wanted else None,
            logprobs=tuple(map(_mapping, tokens, request.logprobs)) if wanted else None,
        )
        return RequestOutput(
            request_id=str(job.index),
            prompt=job.prompt,
            prompt_token_ids=job.tokens,
            outputs=(completion,),
            num_cached_tokens=last.cached_tokens if last is not None else 0,
            error=last.error or None if last is not None else None,
        )


def _mapping(token: int, entry: wire.TokenLogprobs) -> dict[int, float]:
    return {token: entry.chosen, **dict(zip(entry.ids, entry.values, strict=True))}
