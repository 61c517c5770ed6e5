"""Prompts as people give them, checked and cut into tokens. Needs no engine."""

from collections.abc import Sequence
from dataclasses import dataclass

from shoal.errors import RequestError
from shoal.frontend.tokenizer import Tokenizer
from shoal.types import Prompt, SamplingParams


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt that has been checked and cut into tokens."""

    index: int
    prompt: str | None
    tokens: tuple[int, ...]
    params: SamplingParams


class PromptReader:
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
