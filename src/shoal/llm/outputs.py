"""From an engine's updates to what the user gets: texts, reasons, log-probabilities."""

from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain, islice, repeat

from shoal.llm.deltas import Delta
from shoal.llm.lazy_sequence import OnDemand
from shoal.outputs import CompletionOutput, FinishReason, Logprob, Logprobs, RequestOutput
from shoal.text.detokenizer import OutputText
from shoal.text.prompts import Job
from shoal.text.text_stream import CONTEXT
from shoal.text.token_offsets import TokenOffsets
from shoal.text.tokenizer import Tokenizer
from shoal.wire.engine import Finish, SeqUpdate
from shoal.wire.ranks import TokenLogprobs

_REASONS: dict[Finish, FinishReason] = {
    Finish.STOP: "stop",
    Finish.LENGTH: "length",
    Finish.ABORT: "abort",
}


class Completion:
    """One output in the making."""

    def __init__(
        self,
        job: Job,
        index: int,
        tokenizer: Tokenizer | None,
        stop_ids: Set[int],
        context: Sequence[int] = (),
    ) -> None:
        """`stop_ids` end it. `context`: the end of the prompt, as `text_context` gives it."""
        self._job = job
        self._index = index
        self.tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish: FinishReason = "abort"
        self._stop_text: str | None = None
        self._given = 0  # tokens in deltas so far
        self._described: list[Logprobs] = []  # what `output` has told of the first tokens
        params = job.params
        self._token_offsets = (
            TokenOffsets(tokenizer, skip_special_tokens=params.skip_special_tokens)
            if tokenizer is not None and params.detokenize and params.logprobs is not None
            else None
        )
        self._text = (
            OutputText(
                tokenizer,
                context,
                stop=job.stop_texts,
                include_stop=params.include_stop_str_in_output,
                skip_special_tokens=params.skip_special_tokens,
                min_tokens=params.min_tokens,
                offsets=self._token_offsets,
            )
            if tokenizer is not None and params.detokenize
            else None
        )

    def take(self, update: SeqUpdate) -> bool:
        """Adds what has come. True if a stop text ended the output here, where the engine does not know of it."""
        self._logprobs += update.logprobs
        self._tokens += update.tokens
        stopped = update.finish is Finish.STOP and bool(update.tokens) and update.tokens[-1] in self._stop_ids
        if update.finish is not None:
            self._finish = _REASONS[update.finish]
        if self._text is None:
            return False
        # The token that ends an output is one of its tokens and no part of its text.
        shown = update.tokens[:-1] if stopped and not self._job.params.include_stop_str_in_output else update.tokens
        return self._stopped_by(self._text.append(shown))

    def _stopped_by(self, text: str | None) -> bool:
        """Takes the output back to where a stop text was completed, if one was."""
        if text is None or self._text is None:
            return False
        self._stop_text = text
        self._finish = "stop"
        del self._tokens[self._text.num_tokens :]
        del self._logprobs[self._text.num_tokens :]
        del self._described[self._text.num_tokens :]
        return True

    def delta(self, *, last: bool) -> Delta:
        """What has come since the one before. The `last` one says why it is, and has what was held back."""
        if last:
            self._finish_text()
        tokens = tuple(self._tokens[self._given :])
        logprobs = self._logprobs_on_demand(self._given)
        offsets = self._offsets(self._given, whole=self._whole if last else None)
        self._given += len(tokens)
        return Delta(
            self._index,
            self._text.take() if self._text is not None else "",
            tokens,
            logprobs,
            self._finish if last else None,
            self._stop_reason() if last else None,
            offsets,
        )

    def _logprobs_on_demand(self, start: int = 0) -> Sequence[Logprobs] | None:
        """Return the log-probabilities of tokens from `start` on, described when looked at, or None."""
        if self._job.params.logprobs is None:
            return None
        tokens, entries = self._tokens[start:], self._logprobs[start:]
        added = list(islice(self._added(start), len(tokens)))
        tokenizer, left_out = self.tokenizer, self._left_out()

        def describe(place: int) -> Logprobs:
            return described(tokenizer, tokens[place], entries[place], left_out=left_out, added=added[place])

        return OnDemand(min(len(tokens), len(entries)), describe)

    def _all_logprobs(self) -> tuple[Logprobs, ...] | None:
        """Return the log-probabilities of all tokens. Each is described once, however often they are read."""
        found = self._logprobs_on_demand(len(self._described))
        if found is None:
            return None
        self._described += found
        return tuple(self._described)

    def _left_out(self) -> Collection[int]:
        if self.tokenizer is None or not self._job.params.skip_special_tokens:
            return ()
        return self.tokenizer.special_ids

    def _added(self, start: int) -> Iterator[bytes | None]:
        """What each token added to the text; the token that ended the output is no part of it."""
        if self._token_offsets is None:
            return repeat(None)
        return chain(self._token_offsets.token_bytes[start:], repeat(b""))

    def _offsets(self, start: int, *, whole: str | None) -> tuple[int, ...] | None:
        """Of tokens from `start` on. In the `whole` text they lie no further than its end: a stop text is cut off."""
        if self._job.params.logprobs is None:
            return None
        offsets = self._token_offsets
        if offsets is None:
            return (0,) * (len(self._tokens) - start)
        most = offsets.length if whole is None else len(whole)
        known = offsets.offsets[start : len(self._tokens)]
        beyond = [most] * (len(self._tokens) - start - len(known))  # the token that ended the output
        return (*(min(each, most) for each in known), *beyond)

    def _finish_text(self) -> None:
        if self._text is not None and self._stop_text is None:
            self._stopped_by(self._text.finish())  # incomplete bytes read as something in the end

    def output(self, *, ended: bool = True, on_demand: bool = False) -> CompletionOutput:
        """All of it; or, before it has `ended`, what is certain by now. `on_demand`: log-probabilities are described
        when somebody looks at them."""
        if ended:
            self._finish_text()
        wanted = self._job.params.logprobs is not None
        text = self._whole
        return CompletionOutput(
            index=self._index,
            text=text,
            token_ids=tuple(self._tokens),
            finish_reason=self._finish if ended else None,
            cumulative_logprob=sum(entry.chosen for entry in self._logprobs) if wanted else None,
            logprobs=self._logprobs_on_demand() if on_demand else self._all_logprobs(),
            stop_reason=self._stop_reason() if ended else None,
            text_offsets=self._offsets(0, whole=text),
        )

    @property
    def _whole(self) -> str:
        return self._text.text if self._text is not None else ""

    def _stop_reason(self) -> int | str | None:
        if self._stop_text is not None:
            return self._stop_text
        asked_for = self._finish == "stop" and self._tokens and self._tokens[-1] in self._job.stop_ids
        return self._tokens[-1] if asked_for else None


@dataclass(slots=True)
class Answer:
    """All that came of one job: its outputs, and what is known of its prompt."""

    job: Job
    completions: list[Completion]
    running: int  # outputs that have not ended
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position
    cached_tokens: int = 0
    error: str = ""

    @classmethod
    def begun(cls, job: Job, tokenizer: Tokenizer | None, eos: Sequence[int]) -> "Answer":
        """`eos`: the tokens that end a text, whatever the job's parameters say."""
        stop_ids = job.stop_ids if job.params.ignore_eos or job.stop_ids.issuperset(eos) else job.stop_ids.union(eos)
        context = () if tokenizer is None else text_context(tokenizer, job)
        completions = [Completion(job, index, tokenizer, stop_ids, context) for index in range(job.params.n)]
        return cls(job, completions, len(completions))

    def take(self, index: int, update: SeqUpdate) -> bool:
        """As `Completion.take`, for one of the outputs."""
        if update.prompt_logprobs is not None:
            self.prompt_logprobs |= enumerate(update.prompt_logprobs.entries, update.prompt_logprobs.start)
        if index == 0:
            self.cached_tokens = update.cached_tokens
        self.error = self.error or update.error
        return self.completions[index].take(update)

    def output(self) -> RequestOutput:
        return RequestOutput(
            request_id=str(self.job.index),
            prompt=self.job.prompt,
            prompt_token_ids=self.job.tokens,
            outputs=tuple(completion.output() for completion in self.completions),
            num_cached_tokens=self.cached_tokens,
            error=self.error or None,
            finished=self.running == 0,
            prompt_logprobs=None if (prompt := self.described_prompt()) is None else tuple(prompt),
        )

    @property
    def prompt_told(self) -> bool:
        """Is everything known that was asked about the prompt?"""
        wanted = self.job.params.prompt_logprobs is not None
        return not wanted or len(self.prompt_logprobs) >= len(self.job.tokens) - 1

    def described_prompt(self) -> Sequence[Logprobs | None] | None:
        """Log-probabilities of its tokens, which are described when somebody looks at them; None at a token of which
        nothing is known, and where they were not asked for."""
        if self.job.params.prompt_logprobs is None:
            return None
        tokens, entries = self.job.tokens, self.prompt_logprobs
        tokenizer = self.completions[0].tokenizer

        def describe(position: int) -> Logprobs | None:
            entry = entries.get(position)
            return None if entry is None else described(tokenizer, tokens[position], entry)

        return OnDemand(len(tokens), describe)


def text_context(tokenizer: Tokenizer, job: Job) -> tuple[int, ...]:
    """The tokens of a prompt that the texts of its outputs depend on: the last of those that are shown, and the first,
    which says that there is a text before."""
    left_out = tokenizer.special_ids if job.params.skip_special_tokens else frozenset()
    last = [*islice((token for token in reversed(job.tokens) if token not in left_out), CONTEXT)]
    if len(last) == CONTEXT:
        last.append(next(token for token in job.tokens if token not in left_out))
    return tuple(reversed(last))


def described(
    tokenizer: Tokenizer | None,
    token: int,
    entry: TokenLogprobs,
    *,
    left_out: Collection[int] = (),
    added: bytes | None = None,
) -> Logprobs:
    """The likeliest tokens of one position, and the chosen one if it is none of them.

    Args:
        left_out: tokens that no text shows.
        added: what the chosen token added to the text, where that is known.
    """

    def told(value: float, rank: int | None, each: int) -> Logprob:
        if tokenizer is None:
            return Logprob(value, rank)
        text = tokenizer.token_text(each)
        own = b"" if each in left_out else tokenizer.token_bytes(each)
        own = added if each == token and added is not None else own
        return Logprob(value, rank, text, None if own == text.encode("utf-8", "replace") else own)

    likeliest = zip(entry.ids, entry.values, strict=True)
    found = {each: told(value, rank, each) for rank, (each, value) in enumerate(likeliest, 1)}
    return {token: told(entry.chosen, entry.rank, token)} | {
        each: logprob for each, logprob in found.items() if each != token
    }
