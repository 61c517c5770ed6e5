"""Computing which tokens may follow in an output that must obey a grammar, with the library llguidance.

The library supports exactly one end-of-text token, but models have several or none. So we add a token after all others
of the vocabulary and name it as the end-of-text token. It is never drawn; where the library allows it, every
end-of-text token of the model is allowed.

A grammar from a user can make the library take any amount of time and memory, or crash the process. So the code here
only runs in processes of its own (see `structured.grammar_process`).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from shoal.errors import EngineError, structured_outputs_error
from shoal.wire.base import Ids

_WORD_BYTES = 4
_END_TOKEN = "<|shoal:end|>"
_MATCH_OPTIONS = ("single_word", "lstrip", "rstrip", "normalized")
_REPLACED_ERRORS = {
    "NoExtension": "no text satisfies it",
    "Unsatisfiable schema: ": "no text satisfies the schema: ",
    "Unimplemented keys: ": "unsupported keywords of a JSON schema: ",
    "oneOf constraints": "oneOf is supported only where no value satisfies two of its schemas; use anyOf",
}
# Enough fuel to compile a choice of twenty thousand texts; any reasonable grammar compiles within a second.
PARSER_LIMITS = LLParserLimits(verbose_errors=False, initial_lexer_fuel=300_000)


def mask_words(vocab_size: int) -> int:
    """Return the number of 32-bit words in a row of a mask, which has a bit for each token of the vocabulary."""
    return -(-vocab_size // 32)


class Vocabulary:
    """A model's tokenizer in llguidance's form, and the model's end-of-text tokens.

    Sets of tokens are integers here, with bit `1 << token` for each token of the set.

    Args:
        tokenizer_json: the text of the model's `tokenizer.json`.
        eos: ids of the model's end-of-text tokens; may be empty.
        vocab_size: the vocabulary size of the model. Tokens that only the model has are never allowed.

    Raises:
        RequestError: the library cannot read this tokenizer.
    """

    def __init__(self, tokenizer_json: str, eos: Ids, vocab_size: int) -> None:
        try:
            text, self.size = _add_end_token(tokenizer_json)
            self.tokenizer = LLTokenizer(text, eos_token=self.size)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise structured_outputs_error(f"can't read the model's tokenizer: {_shorten_error(str(error))}") from error
        self.eos = frozenset(token for token in eos if token < vocab_size)
        self.end = 1 << self.size  # the bit of the token that we added for the end of the text
        self.eos_bits = sum(1 << token for token in self.eos)
        self.text_bits = ((1 << min(vocab_size, self.size)) - 1) & ~self.eos_bits
        self.row_bytes = mask_words(vocab_size) * _WORD_BYTES
        # Tokens for a row after the end of a text. What is drawn there is dropped, but a row must allow some token.
        self.bits_at_end = self.eos_bits or self.text_bits

    def row(self, bits: int) -> bytes:
        """Return the row of a mask that allows these tokens. The bit `end` stands for all end-of-text tokens."""
        allowed = bits & self.text_bits | (self.eos_bits if bits & self.end else 0)
        return (allowed or self.bits_at_end).to_bytes(self.row_bytes, "little")


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """The tokens that may follow at one position of an output, as the row of a mask.

    `ended`: only end-of-text tokens may follow, so the output is complete.
    """

    row: bytes
    ended: bool


class GrammarState:
    """The state of one output that must obey a grammar: it takes tokens and says which tokens may follow."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._bits: int | None = None  # the tokens that may follow, if they were computed
        self._has_ended = False  # an end-of-text token was drawn
        self.problem = ""  # why no continuation of the text can satisfy the grammar

    @classmethod
    def compile(cls, text: str, vocabulary: Vocabulary, limits: LLParserLimits = PARSER_LIMITS) -> "GrammarState":
        """Return the state at the beginning of an output. `text` is the grammar in llguidance's form.

        Raises:
            RequestError: the text is not a grammar, or no text that the vocabulary can spell satisfies it.
        """
        matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise structured_outputs_error(f"can't be used: {_shorten_error(matcher.get_error())}")
        grammar = cls(matcher, vocabulary)
        grammar.allowed_tokens(())  # checks that a first token exists, and builds the lexer, which copies share
        if grammar.problem:
            raise structured_outputs_error(f"can't be obeyed: {grammar.problem}")
        return grammar

    def copy(self) -> "GrammarState":
        """Return an independent copy with the same text so far."""
        copy = GrammarState(self._matcher.deep_copy(), self._vocabulary)
        copy._bits, copy._has_ended = self._bits, self._has_ended
        return copy

    @property
    def ended(self) -> bool:
        """True if only end-of-text tokens may follow, if one was accepted, or if there is a problem."""
        if self._has_ended or self.problem or self._matcher.is_stopped():
            return True
        return self._matcher.is_accepting() and self._allowed_bits() == self._vocabulary.end

    def accept(self, tokens: Sequence[int]) -> None:
        """Add tokens that were drawn to the output. If there is a problem they are ignored.

        Raises:
            EngineError: one of the tokens may not follow. The state is then unchanged.
        """
        if self.problem:
            return
        valid = self.count_valid(tokens)
        if valid < len(tokens):
            raise EngineError(f"token {tokens[valid]} was drawn, which the grammar does not allow there")
        text = self._leading_text(tokens)
        if text:
            self._matcher.consume_tokens(text)
            self._bits = None
        self._has_ended = self._has_ended or len(text) < len(tokens)

    def count_valid(self, drafts: Sequence[int]) -> int:
        """Return how many of the first drafts may follow one another. Nothing may follow an end-of-text token."""
        if self._has_ended or self.problem:
            return 0
        text = self._leading_text(drafts)
        valid: int = self._matcher.validate_tokens(text) if text else 0
        if valid < len(text) or valid == len(drafts):
            return valid
        if drafts[valid] not in self._vocabulary.eos:
            return valid
        self._matcher.consume_tokens(text)
        may_end = self._matcher.is_accepting()
        self._matcher.rollback(len(text))
        return valid + may_end

    def allowed_tokens(self, drafts: Sequence[int]) -> list[AllowedTokens]:
        """Return the tokens that may follow the text so far, and those that may follow each draft.

        A row consists of `mask_words` little-endian 32-bit words, the lowest bit first. A row is never empty: after
        the end of the text, after a draft that may not follow, and where no token may follow (which sets `problem`) it
        allows the end-of-text tokens, or any token if the model has none.
        """
        vocabulary = self._vocabulary
        positions = [AllowedTokens(vocabulary.row(0 if self._has_ended else self._allowed_bits()), self.ended)]
        text = self._leading_text(drafts[: self.count_valid(drafts)])
        for token in text:
            self._matcher.consume_token(token)
            bits = self._compute_bits()
            ended = self._matcher.is_stopped() or (self._matcher.is_accepting() and bits == vocabulary.end)
            positions.append(AllowedTokens(vocabulary.row(bits), ended))
        if text:
            self._matcher.rollback(len(text))
        positions += [AllowedTokens(vocabulary.row(0), True)] * (1 + len(drafts) - len(positions))
        return positions

    def _allowed_bits(self) -> int:
        """Return the bits of the tokens that may follow the text so far, and of `Vocabulary.end`."""
        if self._bits is None:
            self._bits = self._compute_bits()
        if self._bits == 0 and not self.problem:
            self.problem = "no token of the model may follow the text so far, and the text may not end there"
        return self._bits

    def _compute_bits(self) -> int:
        """Return the bits of the tokens that may follow in the matcher's state.

        If the matcher fails, which cannot be undone, the reason becomes the `problem`.
        """
        mask = int.from_bytes(self._matcher.compute_bitmask(), "little")
        if self._matcher.is_error():
            self.problem = self.problem or _shorten_error(self._matcher.get_error())
            return 0
        return mask & (self._vocabulary.text_bits | self._vocabulary.end)

    def _leading_text(self, tokens: Sequence[int]) -> list[int]:
        """Return the tokens before the first one that is an end-of-text token or unknown to the tokenizer.

        Such tokens would make llguidance fail.
        """
        vocabulary = self._vocabulary
        for i, token in enumerate(tokens):
            if token in vocabulary.eos or not 0 <= token < vocabulary.size:
                return list(tokens[:i])
        return list(tokens)


def _add_end_token(tokenizer_json: str) -> tuple[str, int]:
    """Return the tokenizer with one more special token, and the id of that token, which is larger than all others."""
    tokenizer = json.loads(tokenizer_json)
    vocab, added = tokenizer["model"]["vocab"], tokenizer.setdefault("added_tokens", [])
    ids = [token["id"] for token in added]
    end = 1 + max(*ids, *(vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]), 0)
    if isinstance(vocab, dict):  # else the library takes the number of tokens as its id; but ids may have gaps
        vocab[_END_TOKEN] = end
    added.append({"id": end, "content": _END_TOKEN, "special": True} | dict.fromkeys(_MATCH_OPTIONS, False))
    return json.dumps(tokenizer, ensure_ascii=False), end


def _shorten_error(error: str) -> str:
    """Return the line of the library's report that says what is wrong, in our words if its own would mislead."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["unknown"]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    for start, plain in _REPLACED_ERRORS.items():
        if reason.startswith(start):
            return (plain + reason.removeprefix(start) if start.endswith(": ") else plain)[:300]
    return reason[:300]
