"""Prompts as people give them, checked and cut into tokens. Needs no engine."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shoal.errors import RequestError, overflow
from shoal.frontend.chat import ChatTemplate
from shoal.frontend.structured import GrammarChecker, grammar_text
from shoal.frontend.tokenizer import Tokenizer
from shoal.types import Message, Prompt, SamplingParams, shown


@dataclass(frozen=True, slots=True)
class Job:
    """One prompt that has been checked and cut into tokens, and what its parameters say in tokens."""

    index: int
    prompt: str | None
    tokens: tuple[int, ...]
    params: SamplingParams
    banned: tuple[tuple[int, ...], ...] = ()  # of `bad_words`
    grammar: str = ""  # of `structured_outputs`
    outputs: int = 0  # of all jobs of one request together, where they are more than this one's


@dataclass(frozen=True, slots=True)
class Refused:
    """A prompt that can't be used; among jobs it ends alone."""

    index: int
    prompt: str | None
    tokens: tuple[int, ...]
    error: str


class PromptReader:
    def __init__(
        self,
        tokenizer: Tokenizer | None,
        *,
        vocab_size: int,
        max_model_len: int,
        eos: Sequence[int] = (),
        chat_template: Callable[[], ChatTemplate | None] = lambda: None,
    ) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._max_model_len = max_model_len
        self._eos = frozenset(eos)
        self._chat_template = chat_template
        self._grammars = None if tokenizer is None else GrammarChecker(tokenizer.serialized, tuple(eos), vocab_size)

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True) -> Job:
        """A prompt made ready to run. `add_special_tokens`: those that the tokenizer puts around a text.

        Raises:
            RequestError: it is empty, too long, or no prompt at all, or a parameter does not fit the model.
        """
        text, tokens = self._read(prompt, add_special_tokens=add_special_tokens)
        return self._job(index, text, tokens, params)

    def prepare_chat(
        self,
        index: int,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        add_special_tokens: bool = False,
        **template: Any,
    ) -> Job:
        """A conversation made ready to run, by the model's chat template; `template` goes to `ChatTemplate.render`.

        Raises:
            RequestError: there is no template, the messages do not fit it, or as `prepare`.
        """
        text = self._render(messages, template)
        self._check_length(text)
        tokens = self._encode(self._require_tokenizer(), text, add_special_tokens=add_special_tokens)
        return self._job(index, text, tokens, params)

    def chat_tokens(
        self, messages: Sequence[Message], *, add_special_tokens: bool = False, **template: Any
    ) -> tuple[int, ...]:
        """The tokens of a conversation, of any length.

        Raises:
            RequestError: there is no template, or the messages do not fit it.
        """
        text = self._render(messages, template)
        return self._encode(self._require_tokenizer(), text, add_special_tokens=add_special_tokens)

    def _render(self, messages: Sequence[Message], template: Mapping[str, Any]) -> str:
        chat = self._chat_template()
        if chat is None and template.get("chat_template") is None:
            raise RequestError("this model has no chat template: give chat_template, or plain prompts")
        return (chat or ChatTemplate({})).render(messages, **template)

    def _job(self, index: int, text: str | None, tokens: tuple[int, ...], params: SamplingParams) -> Job:
        if not tokens:
            raise RequestError("the prompt is empty: give some text or at least one token id")
        if len(tokens) >= self._max_model_len:
            raise RequestError(
                f"{overflow(self._max_model_len)}; the prompt has {len(tokens)} tokens, and an output needs one: "
                "shorten it or raise --max-model-len"
            )
        self._check_ids("logit_bias", params.logit_bias or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        if params.stop and self._tokenizer is None:
            raise RequestError("stop takes texts, and this model has no tokenizer: use stop_token_ids")
        banned = self._banned(params)
        self._check_allowed(params, banned)
        return Job(index, text, tokens, params, banned, self._grammar(params))

    def _check_ids(self, name: str, ids: Mapping[int, float] | Sequence[int]) -> None:
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            raise RequestError(
                f"{name} must hold ids of the model's vocabulary, in [0, {self._vocab_size}), got {largest}"
            )

    def _check_allowed(self, params: SamplingParams, banned: Sequence[Sequence[int]]) -> None:
        """Where nothing may be drawn, the sampler would take a token that is not allowed."""
        if params.allowed_token_ids is None:
            return
        allowed = frozenset(params.allowed_token_ids)
        ends = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self._eos)
        forbidden = {
            "min_tokens": ends if params.min_tokens else frozenset(),
            "bad_words": frozenset(run[0] for run in banned if len(run) == 1),
        }
        if allowed <= frozenset().union(*forbidden.values()):
            names = " and ".join(name for name, ids in forbidden.items() if allowed & ids)
            raise RequestError(
                f"{names} with allowed_token_ids {shown(list(params.allowed_token_ids))} leave no token to draw: "
                "allow one that is neither an end (stop_token_ids, or end-of-text without ignore_eos) nor a bad word"
            )

    def _banned(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Each bad word at the start of a text and behind a space, which are different tokens."""
        if not params.bad_words:
            return ()
        tokenizer = self._require_tokenizer()
        found = [
            self._encode(tokenizer, spelled, add_special_tokens=False, what="a text of bad_words")
            for word in params.bad_words
            for spelled in (word, " " + word.lstrip())
        ]
        return tuple(dict.fromkeys(ids for ids in found if ids))

    def _grammar(self, params: SamplingParams) -> str:
        if params.structured_outputs is None:
            return ""
        if self._grammars is None:
            raise RequestError("structured_outputs need a tokenizer, which this model does not have")
        grammar = grammar_text(params.structured_outputs)
        self._grammars.check(grammar)
        return grammar

    def _read(self, prompt: Prompt, *, add_special_tokens: bool) -> tuple[str | None, tuple[int, ...]]:
        if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
            return None, self._check_tokens(prompt["prompt_token_ids"])
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(text, str):
            raise RequestError(f"a prompt is a text or has prompt_token_ids, got {type(prompt).__name__}")
        self._check_length(text)
        tokenizer = self._require_tokenizer()
        return text, self._encode(tokenizer, text, add_special_tokens=add_special_tokens) if text else ()

    def _check_length(self, text: str) -> None:
        """Says of a text that is far too long that it is, without the seconds that cutting it into tokens takes."""
        longest = None if len(text) <= self._max_model_len else self._require_tokenizer().longest_token()
        if longest is not None and len(text) > longest * self._max_model_len:
            raise RequestError(
                f"{overflow(self._max_model_len)}; the prompt has {len(text)} characters, more than they can hold: "
                "shorten it or raise --max-model-len"
            )

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer: give prompt_token_ids")
        return self._tokenizer

    def _encode(
        self, tokenizer: Tokenizer, text: str, *, add_special_tokens: bool, what: str = "the prompt"
    ) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RequestError(f"{what} is not valid Unicode: {error.reason} at character {error.start}") from None
        tokens = tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
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
                raise RequestError(f"prompt_token_ids: {shown(token)} is no id of a vocabulary of {self._vocab_size}")
        return tuple(tokens)
