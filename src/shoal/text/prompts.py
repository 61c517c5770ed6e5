"""The reader of prompts: it checks them and encodes them as tokens. It needs no engine."""

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

from shoal.errors import RequestError, context_length_exceeded, structured_outputs_error
from shoal.log import get_logger
from shoal.params import Message, Prompt, PromptDict, SamplingParams
from shoal.structured.schema.prepare import summarize_keywords
from shoal.text.chat_template import ChatTemplate
from shoal.text.stop_texts import StopTexts
from shoal.text.structured_outputs import PreparedGrammar, grammar_text
from shoal.text.tokenizer import Tokenizer
from shoal.values import shown

# Tokens that are encoded before those that are kept. The place where a text is cut changes only the tokens beside it.
_MARGIN = 64

log = get_logger("prompts")

_MAX_LOGGED = 256  # remembered lists of ignored keywords, so that each list of a file of prompts is logged once
_MAX_LINE = 2000  # characters of a log line


@dataclass(frozen=True, slots=True)
class Job:
    """A prompt that was checked and encoded, with its parameters and those of them that are tokens."""

    index: int
    prompt: str | None
    tokens: tuple[int, ...]
    params: SamplingParams
    banned: tuple[tuple[int, ...], ...] = ()  # the tokens of `bad_words`
    grammar: str = ""  # the grammar of `structured_outputs`
    cache_salt: str = ""  # only prompts with the same salt share cached prefixes
    ignored_keywords: tuple[str, ...] = ()  # keywords of the schema that the grammar leaves out, with their places
    outputs: int = 0  # the outputs of all jobs of the request; 0: those of this job
    stop_ids: frozenset[int] = field(init=False, repr=False, compare=False)  # `stop_token_ids`
    stop_texts: StopTexts | None = field(init=False, repr=False, compare=False)  # the automaton of `stop`

    def __post_init__(self) -> None:
        """Make the sets that all outputs share, on the thread that prepares the prompt."""
        object.__setattr__(self, "stop_ids", _id_set(tuple(self.params.stop_token_ids or ())))
        object.__setattr__(self, "stop_texts", _stop_texts(tuple(self.params.stop)) if self.params.stop else None)


@lru_cache(maxsize=2)  # the prompts of one request are prepared one after the other
def _id_set(ids: tuple[int, ...]) -> frozenset[int]:
    return frozenset(ids)


@lru_cache(maxsize=2)
def _stop_texts(texts: tuple[str, ...]) -> StopTexts:
    return StopTexts(texts)


@dataclass(frozen=True, slots=True)
class RefusedPrompt:
    """A prompt that cannot be used. The other prompts of a run go on."""

    index: int
    prompt: str | None
    tokens: tuple[int, ...]
    error: str


def salted(prompt: Prompt, salt: str | None) -> Prompt:
    """Return the prompt with a `cache_salt`, or the prompt itself if there is none."""
    if salt is None:
        return prompt
    bare: PromptDict = {"prompt": prompt} if isinstance(prompt, str) else prompt
    return {**bare, "cache_salt": salt}


_MAX_CHARACTERS = 1 << 23  # characters that are encoded if the length of the longest token is not known
_Encoded = tuple[tuple[tuple[int, ...], ...], PreparedGrammar]  # parameters as tokens: `Job.banned`, and the grammar


class PromptReader:
    """A reader of the prompts for one model."""

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
        self._logged: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self._latest: tuple[SamplingParams, _Encoded] | None = None  # the latest parameters

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True) -> Job:
        """Return a prompt that is ready to run. Its grammar is not checked: a `GrammarChecker` does that.

        Args:
            add_special_tokens: let the tokenizer add its special tokens before and after a text.

        Raises:
            RequestError: the prompt is empty, too long or malformed, or a parameter does not fit the model.
        """
        keep = self._num_kept(params)
        text, tokens = self._read(prompt, keep, add_special_tokens=add_special_tokens)
        salt = prompt.get("cache_salt") if isinstance(prompt, dict) else None
        return self._job(index, text, tokens, params, salt)

    def prepare_chat(
        self,
        index: int,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        add_special_tokens: bool = False,
        cache_salt: str | None = None,
        **template: Any,
    ) -> Job:
        """Return a conversation that is ready to run, in the form of the model's chat template.

        Args:
            add_special_tokens: let the tokenizer add its special tokens before and after the rendered text.
            cache_salt: only prompts with the same salt share cached prefixes.
            template: arguments for `ChatTemplate.render`.

        Raises:
            RequestError: there is no template, or it cannot render the messages; or see `prepare`.
        """
        keep = self._num_kept(params)
        text = self._render(messages, template)
        tokens = self._encode_text(text, keep, add_special_tokens=add_special_tokens)
        return self._job(index, text, tokens, params, cache_salt)

    def chat_tokens(
        self, messages: Sequence[Message], *, add_special_tokens: bool = False, **template: Any
    ) -> tuple[int, ...]:
        """Return the tokens of a conversation, which may be longer than the model allows.

        Raises:
            RequestError: there is no template, or it cannot render the messages.
        """
        text = self._render(messages, template)
        if len(text) > _MAX_CHARACTERS:
            raise RequestError.about(
                "messages", f"may have at most {_MAX_CHARACTERS} characters here, got {len(text)}: send fewer"
            )
        return self._encode(self._require_tokenizer(), text, add_special_tokens=add_special_tokens)

    def _render(self, messages: Sequence[Message], template: Mapping[str, Any]) -> str:
        chat = self._chat_template()
        if chat is None and template.get("chat_template") is None:
            raise RequestError("this model has no chat template: give chat_template, or plain prompts", "messages")
        return (chat or ChatTemplate({})).render(messages, **template)

    def _job(self, index: int, text: str | None, tokens: tuple[int, ...], params: SamplingParams, salt: object) -> Job:
        if salt is not None and (not isinstance(salt, str) or not salt):
            raise RequestError.about("cache_salt", f"must be a string that is not empty, got {shown(salt)}")
        if not tokens:
            raise RequestError("the prompt is empty: give some text or at least one token id", "prompt")
        if len(tokens) >= self._max_model_len:
            raise self._too_long(
                f"{len(tokens)} tokens, but the output needs at least one: shorten it or raise --max-model-len"
            )
        banned, grammar = self._encode_params(params)
        return Job(index, text, tokens, params, banned, grammar.text, salt or "", grammar.ignored)

    def _encode_params(self, params: SamplingParams) -> _Encoded:
        """Check parameters and return them as tokens. The prompts of a request share the result."""
        latest = self._latest
        if latest is None or latest[0] is not params:
            latest = self._latest = (params, self._check_and_encode(params))
        return latest[1]

    def _check_and_encode(self, params: SamplingParams) -> _Encoded:
        self._check_ids("logit_bias", params.logit_bias or ())
        self._check_ids("allowed_token_ids", params.allowed_token_ids or ())
        self._check_ids("stop_token_ids", params.stop_token_ids or ())
        if params.stop and self._tokenizer is None:
            raise RequestError.about("stop", "takes texts, and this model has no tokenizer: use stop_token_ids")
        banned = self._encode_bad_words(params)
        self._check_allowed(params, banned)
        return banned, self._prepare_grammar(params)

    def _num_kept(self, params: SamplingParams) -> int | None:
        """Return how many of a prompt's last tokens are kept; None: all."""
        asked = params.truncate_prompt_tokens
        if asked is None:
            return None
        if asked > self._max_model_len:
            raise RequestError.about(
                "truncate_prompt_tokens", f"must be at most --max-model-len, {self._max_model_len}, got {shown(asked)}"
            )
        return self._max_model_len - 1 if asked == -1 else asked  # the output needs a token

    def _check_ids(self, name: str, ids: Mapping[int, float] | Sequence[int]) -> None:
        largest = max(ids, default=0)
        if largest >= self._vocab_size:
            raise RequestError.about(
                name, f"must hold ids of the model's vocabulary, in [0, {self._vocab_size}), got {largest}"
            )

    def _check_allowed(self, params: SamplingParams, banned: Sequence[Sequence[int]]) -> None:
        """Check that some token may be drawn first. If not, the sampler would draw a token that is not allowed."""
        if params.allowed_token_ids is None:
            return
        allowed = frozenset(params.allowed_token_ids)
        ends = frozenset(params.stop_token_ids or ()) | (frozenset() if params.ignore_eos else self._eos)
        forbidden = {
            "min_tokens": ends if params.min_tokens else frozenset(),
            "bad_words": frozenset(run[0] for run in banned if len(run) == 1),
        }
        if allowed <= frozenset().union(*forbidden.values()):
            names = [name for name, ids in forbidden.items() if allowed & ids]
            raise RequestError(
                f"{' and '.join(names)} with allowed_token_ids {shown(list(params.allowed_token_ids))} leave no token "
                "to draw: allow one that is neither an end (stop_token_ids, or end-of-text without ignore_eos) nor a "
                "bad word",
                names[0],
            )

    def _encode_bad_words(self, params: SamplingParams) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of each bad word, at the start of a text and after a space, where they are different."""
        if not params.bad_words:
            return ()
        tokenizer = self._require_tokenizer()
        found = [
            self._encode(tokenizer, spelled, "bad_words", "a text of bad_words", add_special_tokens=False)
            for word in params.bad_words
            for spelled in (word, " " + word.lstrip())
        ]
        return tuple(dict.fromkeys(ids for ids in found if ids))

    def _prepare_grammar(self, params: SamplingParams) -> PreparedGrammar:
        if params.structured_outputs is None:
            return PreparedGrammar("")
        if self._tokenizer is None:
            raise structured_outputs_error("needs a tokenizer, which this model does not have")
        grammar = grammar_text(params.structured_outputs)
        if grammar.ignored and grammar.ignored not in self._logged:
            self._logged[grammar.ignored] = None
            if len(self._logged) > _MAX_LOGGED:
                self._logged.popitem(last=False)
            log.warning(
                "keywords of a schema are ignored, because they can't be obeyed: %s",
                summarize_keywords(grammar.ignored, _MAX_LINE),
            )
        return grammar

    def _read(
        self, prompt: Prompt, keep: int | None, *, add_special_tokens: bool
    ) -> tuple[str | None, tuple[int, ...]]:
        if isinstance(prompt, dict) and "prompt_token_ids" in prompt:
            return None, self._check_tokens(prompt["prompt_token_ids"])[-(keep or 0) :]
        text = prompt.get("prompt") if isinstance(prompt, dict) else prompt
        if not isinstance(text, str):
            raise RequestError(f"a prompt is a text or has prompt_token_ids, got {type(prompt).__name__}", "prompt")
        return text, self._encode_text(text, keep, add_special_tokens=add_special_tokens) if text else ()

    def _encode_text(self, text: str, keep: int | None, *, add_special_tokens: bool) -> tuple[int, ...]:
        """Return the tokens of a text, or the last `keep` of them. Of a very long text only the end is encoded then."""
        tokenizer = self._require_tokenizer()
        if keep is None:
            self._check_length(text)
            return self._encode(tokenizer, text, add_special_tokens=add_special_tokens)
        longest = None if len(text) <= keep else tokenizer.longest_token()
        if longest is not None:
            text = text[-(keep + _MARGIN) * longest :]
        return self._encode(tokenizer, text, add_special_tokens=add_special_tokens)[-keep:]

    def _check_length(self, text: str) -> None:
        """Check that a text is not far too long, without encoding it, which would take seconds.

        Raises:
            RequestError: it is longer than any prompt of the model.
        """
        longest = None if len(text) <= self._max_model_len else self._require_tokenizer().longest_token()
        if longest is not None and len(text) > longest * self._max_model_len:
            raise self._too_long(
                f"{len(text)} characters, more than that many tokens can hold: shorten it or raise --max-model-len"
            )
        most = max(_MAX_CHARACTERS, 16 * self._max_model_len)
        if longest is None and len(text) > most:
            raise self._too_long(f"{len(text)} characters: shorten it")

    def _too_long(self, length: str) -> RequestError:
        return context_length_exceeded(self._max_model_len, f"the prompt has {length}")

    def _require_tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise RequestError("this model has no tokenizer: give prompt_token_ids", "prompt")
        return self._tokenizer

    def _encode(
        self,
        tokenizer: Tokenizer,
        text: str,
        param: str = "prompt",
        what: str = "the prompt",
        *,
        add_special_tokens: bool,
    ) -> tuple[int, ...]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            why = f"{what} is not valid Unicode: {error.reason} at character {error.start}"
            raise RequestError(why, param) from None
        tokens = tuple(tokenizer.encode(text, add_special_tokens=add_special_tokens))
        if tokens and max(tokens) >= self._vocab_size:
            raise RequestError(
                f"the tokenizer gives the id {max(tokens)}, the model's vocabulary has {self._vocab_size}: "
                "tokenizer and model do not match; give prompt_token_ids or the right tokenizer.json",
                param,
            )
        return tokens

    def _check_tokens(self, tokens: object) -> tuple[int, ...]:
        if isinstance(tokens, str | bytes) or not isinstance(tokens, Sequence):
            raise RequestError("prompt_token_ids must be a list of integers", "prompt")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self._vocab_size:
                why = (
                    f"prompt_token_ids: {shown(token)} is not a token id: the vocabulary has {self._vocab_size} tokens"
                )
                raise RequestError(why, "prompt")
        return tuple(tokens)
