"""Offline requests: prompts in, finished outputs out, as they finish."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from shoal import wire
from shoal.engine.request import encode_tokens
from shoal.errors import RequestError
from shoal.frontend.tokenizer import Tokenizer
from shoal.protocols import EngineClient
from shoal.types import CompletionOutput, FinishReason, Prompt, RequestOutput, SamplingParams

_POLL_S = 1.0
_WINDOW = 1024  # requests that the engine has at a time: enough to keep it busy, few enough for any job's memory
_REASONS: dict[wire.Finish, FinishReason] = {
    wire.Finish.STOP: "stop",
    wire.Finish.LENGTH: "length",
    wire.Finish.ABORT: "abort",
}


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt that has been checked and cut into tokens."""

    index: int
    prompt: str | None
    tokens: tuple[int, ...]
    params: SamplingParams


@dataclass(slots=True)
class _Running:
    job: Job
    tokens: list[int] = field(default_factory=list)
    logprobs: list[wire.TokenLogprobs] = field(default_factory=list)


class PromptReader:
    """Checks prompts and cuts them into tokens. Needs no engine."""

    def __init__(self, tokenizer: Tokenizer | None, *, vocab_size: int, max_model_len: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams) -> Job:
        """A prompt made ready to run.

        Raises:
            RequestError: it is empty, too long, or no prompt at all.
        """
        text, tokens = self._read(prompt)
        if not tokens:
            raise RequestError("the prompt is empty: give some text or at least one token id")
        if len(tokens) >= self._max_model_len:
            raise RequestError(
                f"the prompt has {len(tokens)} tokens; with --max-model-len {self._max_model_len} it may have "
                f"{self._max_model_len - 1} at most: shorten it or raise --max-model-len"
            )
        return Job(index, text, tokens, params)

    def _read(self, prompt: Prompt) -> tuple[str | None, tuple[int, ...]]:
        if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
            return None, self._check_tokens(prompt["prompt_token_ids"])
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(text, str):
            raise RequestError(f"a prompt is a text or has prompt_token_ids, got {type(prompt).__name__}")
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer: give prompt_token_ids")
        return text, self._encode(self._tokenizer, text) if text else ()

    def _encode(self, tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"the prompt is not valid Unicode: {error.reason} at character {error.start}") from None
        tokens = tuple(tokenizer.encode(text))
        if tokens and max(tokens) >= self._vocab_size:
            raise RequestError(
                f"the tokenizer gives the id {max(tokens)}, the model's vocabulary has {self._vocab_size}: "
                "they do not belong together; give prompt_token_ids or the right tokenizer.json"
            )
        return tokens

    def _check_tokens(self, tokens: object) -> tuple[int, ...]:
        if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence):
            raise RequestError("prompt_token_ids must be a list of integers")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self._vocab_size:
                raise RequestError(f"prompt_token_ids: {token!r} is no id of a vocabulary of {self._vocab_size}")
        return tuple(tokens)


class OfflineRunner:
    """Prepares prompts and runs them on an engine."""

    def __init__(
        self,
        client: EngineClient,
        tokenizer: Tokenizer | None,
        *,
        eos: Sequence[int],
        vocab_size: int,
        max_model_len: int,
        seed: int,
    ) -> None:
        self._client = client
        self._tokenizer = tokenizer
        self._eos = tuple(eos)
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._seed = seed
        self._next_seq = 0
        self._reader = PromptReader(tokenizer, vocab_size=vocab_size, max_model_len=max_model_len)

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams) -> Job:
        """A prompt made ready for `run`.

        Raises:
            RequestError: it is empty, too long, or no prompt at all.
        """
        return self._reader.prepare(index, prompt, params)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[int, RequestOutput]]:
        """(index, output) of each job as it finishes. If the caller stops early, what still runs is aborted."""
        running: dict[int, _Running] = {}
        source = iter(jobs)
        exhausted = False
        try:
            while running or not exhausted:
                while not exhausted and len(running) < _WINDOW:
                    job = next(source, None)
                    if job is None:
                        exhausted = True
                    else:
                        self._add(job, running)
                if running:
                    yield from self._collect(running)
        finally:
            self._client.abort(tuple(running))

    def _add(self, job: Job, running: dict[int, _Running]) -> None:
        seq = self._next_seq
        self._next_seq += 1
        params = job.params
        sampling = wire.Sampling(
            seed=self._seed_of(seq) if params.seed is None else params.seed & 0xFFFFFFFFFFFFFFFF,
            temperature=params.temperature,
            top_k=min(max(params.top_k, 0), self._vocab_size),
            top_p=params.top_p,
            logprobs=-1 if params.logprobs is None else min(params.logprobs, self._vocab_size),
        )
        request = wire.EngineRequest(
            seq=seq,
            tokens=encode_tokens(list(job.tokens)),
            sampling=sampling,
            max_tokens=min(params.max_tokens, self._max_model_len - len(job.tokens)),
            stop_ids=params.stop_token_ids + (() if params.ignore_eos else self._eos),
        )
        running[seq] = _Running(job)
        self._client.add(request)

    def _seed_of(self, seq: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}:{seq}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def _collect(self, running: dict[int, _Running]) -> Iterator[tuple[int, RequestOutput]]:
        for update in self._client.updates(_POLL_S):
            request = running.get(update.seq)
            if request is None:  # of a job that was given up
                continue
            request.tokens += update.tokens
            request.logprobs += update.logprobs
            if update.finish is not None:
                del running[update.seq]
                yield request.job.index, self._output(request, update)

    def _output(self, request: _Running, last: wire.SeqUpdate) -> RequestOutput:
        job, tokens = request.job, request.tokens
        finish = _REASONS[last.finish] if last.finish is not None else "abort"
        # The token that ends a text is no part of the text, but of the tokens.
        text_tokens = tokens[:-1] if finish == "stop" else tokens
        wanted = job.params.logprobs is not None
        completion = CompletionOutput(
            index=0,
            text=self._tokenizer.decode(text_tokens) if self._tokenizer else "",
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
            num_cached_tokens=last.cached_tokens,
            error=last.error or None,
        )


def _mapping(token: int, entry: wire.TokenLogprobs) -> dict[int, float]:
    return {token: entry.chosen, **dict(zip(entry.ids, entry.values, strict=True))}
