"""The outputs of a prompt while they are generated: from an engine's updates to texts and log-probabilities."""

from collections.abc import Collection, Iterator, Sequence, Set
from dataclasses import dataclass, field
from itertools import chain, islice, repeat

from shoal.llm.deltas import Delta
from shoal.llm.lazy_sequence import LazySequence
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
    """An output of a prompt, while it is generated."""

    def __init__(
        self,
        job: Job,
        index: int,
        tokenizer: Tokenizer | None,
        stop_ids: Set[int],
        context: Sequence[int] = (),
    ) -> None:
        """Begin an output without tokens.

        Args:
            index: the number of the output among those of its prompt.
            tokenizer: None: the output has no text.
            stop_ids: the tokens that end the output.
            context: the part of the prompt that the text depends on (see `text_context`).
        """
        self._job = job
        self._index = index
        self.tokenizer = tokenizer
        self._stop_ids = stop_ids
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._finish: FinishReason = "abort"
        self._stop_text: str | None = None
        self._given = 0  # number of tokens that deltas have had
        self._described: list[Logprobs] = []  # of the first tokens: the log-probabilities that `output` has returned
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
                spaces_between_special_tokens=params.spaces_between_special_tokens,
                min_tokens=params.min_tokens,
                offsets=self._token_offsets,
            )
            if tokenizer is not None and params.detokenize
            else None
        )

    def take(self, update: SeqUpdate) -> bool:
        """Add an update. Return True if the output has reached a stop text, which the engine cannot know."""
        self._logprobs += update.logprobs
        self._tokens += update.tokens
        stopped = update.finish is Finish.STOP and bool(update.tokens) and update.tokens[-1] in self._stop_ids
        if update.finish is not None:
            self._finish = _REASONS[update.finish]
        if self._text is None:
            return False
        # The token that ends an output is one of its tokens, but not part of its text.
        shown = update.tokens[:-1] if stopped and not self._job.params.include_stop_str_in_output else update.tokens
        return self._stop_at(self._text.append(shown))

    def _stop_at(self, stop_text: str | None) -> bool:
        """Remove the tokens after the one that completed this stop text. Return False if there is no stop text."""
        if stop_text is None or self._text is None:
            return False
        self._stop_text = stop_text
        self._finish = "stop"
        del self._tokens[self._text.num_tokens :]
        del self._logprobs[self._text.num_tokens :]
        del self._described[self._text.num_tokens :]
        return True

    def delta(self, *, last: bool) -> Delta:
        """Return what is new since the delta before.

        The last delta has the reason of the end, and the text that was held back.
        """
        if last:
            self._finish_text()
        tokens = tuple(self._tokens[self._given :])
        logprobs = self._lazy_logprobs(self._given)
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

    def _lazy_logprobs(self, start: int = 0) -> Sequence[Logprobs] | None:
        """Return the log-probabilities of the tokens from `start` on, described only when they are read.

        None if they were not asked for.
        """
        if self._job.params.logprobs is None:
            return None
        tokens, entries = self._tokens[start:], self._logprobs[start:]
        added = list(islice(self._added_bytes(start), len(tokens)))
        tokenizer, hidden = self.tokenizer, self._hidden_tokens()

        def describe(place: int) -> Logprobs:
            return describe_logprobs(tokenizer, tokens[place], entries[place], hidden=hidden, added=added[place])

        return LazySequence(min(len(tokens), len(entries)), describe)

    def _all_logprobs(self) -> tuple[Logprobs, ...] | None:
        """Return the log-probabilities of all tokens. Those that were returned before are not described again."""
        found = self._lazy_logprobs(len(self._described))
        if found is None:
            return None
        self._described += found
        return tuple(self._described)

    def _hidden_tokens(self) -> Collection[int]:
        """Return the tokens that are left out of the text."""
        if self.tokenizer is None or not self._job.params.skip_special_tokens:
            return ()
        return self.tokenizer.special_ids

    def _added_bytes(self, start: int) -> Iterator[bytes | None]:
        """Give for each token from `start` on the bytes that it added to the text; None if that is not known.

        The token that ended the output added none.
        """
        if self._token_offsets is None:
            return repeat(None)
        return chain(self._token_offsets.token_bytes[start:], repeat(b""))

    def _offsets(self, start: int, *, whole: str | None) -> tuple[int, ...] | None:
        """Return where the tokens from `start` on begin in the text of the output; None if it was not asked for.

        If the `whole` text is given, no token begins after its end: a stop text may have been cut off there.
        """
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
            self._stop_at(self._text.finish())  # incomplete bytes now become text, which may complete a stop text

    def output(self, *, ended: bool = True, lazy: bool = False) -> CompletionOutput:
        """Return the output so far, as the user gets it.

        Args:
            ended: False: the output goes on, so text that a stop text may still cut off is left out.
            lazy: describe log-probabilities only when they are read.
        """
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
            logprobs=self._lazy_logprobs() if lazy else self._all_logprobs(),
            stop_reason=self._stop_reason() if ended else None,
            text_offsets=self._offsets(0, whole=text),
        )

    @property
    def _whole(self) -> str:
        return self._text.text if self._text is not None else ""

    def _stop_reason(self) -> int | str | None:
        if self._stop_text is not None:
            return self._stop_text
        by_stop_id = self._finish == "stop" and self._tokens and self._tokens[-1] in self._job.stop_ids
        return self._tokens[-1] if by_stop_id else None


@dataclass(slots=True)
class PromptOutputs:
    """All outputs of one prompt while they are generated, and the log-probabilities of the prompt."""

    job: Job
    completions: list[Completion]
    running: int  # number of outputs that have not ended
    prompt_logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)  # by position
    cached_tokens: int = 0
    error: str = ""

    @classmethod
    def begin(cls, job: Job, tokenizer: Tokenizer | None, eos: Sequence[int]) -> "PromptOutputs":
        """Return the outputs of a job, without tokens yet.

        Args:
            eos: the model's end-of-text tokens.
        """
        stop_ids = job.stop_ids if job.params.ignore_eos or job.stop_ids.issuperset(eos) else job.stop_ids.union(eos)
        context = () if tokenizer is None else text_context(tokenizer, job)
        completions = [Completion(job, index, tokenizer, stop_ids, context) for index in range(job.params.n)]
        return cls(job, completions, len(completions))

    def take(self, index: int, update: SeqUpdate) -> bool:
        """Add an update of the output `index`. Return True if the output has reached a stop text."""
        if update.prompt_logprobs is not None:
            self.prompt_logprobs |= enumerate(update.prompt_logprobs.entries, update.prompt_logprobs.start)
        if index == 0:
            self.cached_tokens = update.cached_tokens
        self.error = self.error or update.error
        return self.completions[index].take(update)

    def output(self) -> RequestOutput:
        """Return all outputs, as the user gets them."""
        return RequestOutput(
            request_id=str(self.job.index),
            prompt=self.job.prompt,
            prompt_token_ids=self.job.tokens,
            outputs=tuple(completion.output() for completion in self.completions),
            num_cached_tokens=self.cached_tokens,
            error=self.error or None,
            finished=self.running == 0,
            prompt_logprobs=None if (prompt := self.lazy_prompt_logprobs()) is None else tuple(prompt),
        )

    @property
    def prompt_complete(self) -> bool:
        """True if all log-probabilities of the prompt that were asked for are known."""
        wanted = self.job.params.prompt_logprobs is not None
        return not wanted or len(self.prompt_logprobs) >= len(self.job.tokens) - 1

    def lazy_prompt_logprobs(self) -> Sequence[Logprobs | None] | None:
        """Return the log-probabilities of the prompt's tokens, described only when they are read.

        An item is None if nothing is known about its token. The result is None if they were not asked for.
        """
        if self.job.params.prompt_logprobs is None:
            return None
        tokens, entries = self.job.tokens, self.prompt_logprobs
        tokenizer = self.completions[0].tokenizer

        def describe(position: int) -> Logprobs | None:
            entry = entries.get(position)
            return None if entry is None else describe_logprobs(tokenizer, tokens[position], entry)

        return LazySequence(len(tokens), describe)


def text_context(tokenizer: Tokenizer, job: Job) -> tuple[int, ...]:
    """Return the tokens of a prompt that the texts of its outputs depend on.

    These are the last tokens that the text shows, and the first one, which tells that there is text before the last.
    """
    hidden = tokenizer.special_ids if job.params.skip_special_tokens else frozenset()
    last = [*islice((token for token in reversed(job.tokens) if token not in hidden), CONTEXT)]
    if len(last) == CONTEXT:
        last.append(next(token for token in job.tokens if token not in hidden))
    return tuple(reversed(last))


def describe_logprobs(
    tokenizer: Tokenizer | None,
    token: int,
    entry: TokenLogprobs,
    *,
    hidden: Collection[int] = (),
    added: bytes | None = None,
) -> Logprobs:
    """Return the log-probabilities of one position: of the chosen token, and of the likeliest ones.

    Args:
        token: the chosen token.
        hidden: tokens that are left out of the text.
        added: the bytes that the chosen token added to the text, if they are known.
    """

    def describe(value: float, rank: int | None, each: int) -> Logprob:
        if tokenizer is None:
            return Logprob(value, rank)
        text = tokenizer.token_text(each)
        own = b"" if each in hidden else tokenizer.token_bytes(each)
        own = added if each == token and added is not None else own
        return Logprob(value, rank, text, None if own == text.encode("utf-8", "replace") else own)

    likeliest = zip(entry.ids, entry.values, strict=True)
    found = {each: describe(value, rank, each) for rank, (each, value) in enumerate(likeliest, 1)}
    return {token: describe(entry.chosen, entry.rank, token)} | {
        each: logprob for each, logprob in found.items() if each != token
    }
