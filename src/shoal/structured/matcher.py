"""Which tokens may follow, so that an output obeys a grammar. By llguidance.

The library knows one end-of-text token and models have several, or none. So it is told of a token beyond every
vocabulary, which is never drawn; where it allows that one, every end-of-text token of the model is allowed.

A grammar that a user sends may have the library take any time and memory, or end the process. So nothing here runs in
a process that anybody else needs: see `structured.grammar_process`.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from shoal.errors import EngineError, RequestError
from shoal.wire.base import Ids

_WORD = 4  # bytes
_END = "<|shoal:end|>"
_END_MATCHES = ("single_word", "lstrip", "rstrip", "normalized")
_PLAIN = {
    "NoExtension": "no text satisfies it",
    "Unsatisfiable schema: ": "no text satisfies the schema: ",
    "Unimplemented keys: ": "unsupported keywords of a JSON schema: ",
    "oneOf constraints": "oneOf is supported only where no value satisfies two of its schemas; use anyOf",
}
# So much that a choice of twenty thousand texts is compiled, and that nothing well-behaved takes more than a second.
LIMITS = LLParserLimits(verbose_errors=False, initial_lexer_fuel=300_000)


def words_of(vocab_size: int) -> int:
    """32-bit words in a row of a mask."""
    return -(-vocab_size // 32)


class Vocabulary:
    """A model's tokenizer as llguidance knows it, and the end-of-text tokens as it doesn't.

    Args:
        tokenizer_json: the text of the model's `tokenizer.json`.
        eos: the model's end-of-text tokens; may be empty.
        vocab_size: the model's, which may be larger than the tokenizer's (the rest is never allowed) or smaller.

    Raises:
        RequestError: the text is no tokenizer that the library can read.
    """

    def __init__(self, tokenizer_json: str, eos: Ids, vocab_size: int) -> None:
        try:
            text, self.size = _with_end(tokenizer_json)
            self.tokenizer = LLTokenizer(text, eos_token=self.size)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RequestError(f"structured_outputs can't read the model's tokenizer: {_reason(str(error))}") from error
        self.eos = frozenset(token for token in eos if token < vocab_size)
        self.end = 1 << self.size  # the bit of the token that stands for the end
        self.eos_bits = sum(1 << token for token in self.eos)
        self.text_bits = ((1 << min(vocab_size, self.size)) - 1) & ~self.eos_bits
        self.row_bytes = words_of(vocab_size) * _WORD
        # Behind the end: what an engine draws there is dropped, but a row must allow something.
        self.at_end = self.eos_bits or self.text_bits

    def row(self, bits: int) -> bytes:
        """One row of a mask. In `bits`, `end` says that the text may end."""
        allowed = bits & self.text_bits | (self.eos_bits if bits & self.end else 0)
        return (allowed or self.at_end).to_bytes(self.row_bytes, "little")


@dataclass(frozen=True, slots=True)
class AllowedTokens:
    """What may be drawn behind some token of an output. `ended`: nothing but end-of-text tokens."""

    row: bytes
    ended: bool


class Grammar:
    """What one output has so far, seen by its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._bits: int | None = None  # what may follow now, where it is known
        self._over = False  # an end-of-text token was drawn
        self.problem = ""  # why the text can't be brought to an end that the grammar accepts

    @classmethod
    def compile(cls, text: str, vocabulary: Vocabulary, limits: LLParserLimits = LIMITS) -> "Grammar":
        """The state at the beginning of an output. `text` is in llguidance's form.

        Raises:
            RequestError: it is no grammar, no text satisfies it, or the vocabulary can't spell one that does.
        """
        matcher = LLMatcher(vocabulary.tokenizer, text, log_level=0, limits=limits)
        if matcher.is_error():
            raise RequestError(f"structured_outputs can't be used: {_reason(matcher.get_error())}")
        grammar = cls(matcher, vocabulary)
        grammar.places(())  # finds out whether there is a first token, and builds the lexer for all copies
        if grammar.problem:
            raise RequestError(f"structured_outputs can't be obeyed: {grammar.problem}")
        return grammar

    def fresh(self) -> "Grammar":
        """A copy. The text so far is the same."""
        copy = Grammar(self._matcher.deep_copy(), self._vocabulary)
        copy._bits, copy._over = self._bits, self._over
        return copy

    @property
    def ended(self) -> bool:
        """Nothing may follow but end-of-text tokens, or one was accepted, or there is a problem."""
        if self._over or self.problem or self._matcher.is_stopped():
            return True
        return self._matcher.is_accepting() and self._following() == self._vocabulary.end

    def accept(self, tokens: Sequence[int]) -> None:
        """Takes in tokens that were drawn. Where there is a problem they do not count.

        Raises:
            EngineError: one of them may not follow. The state is as before then.
        """
        if self.problem:
            return
        right = self.valid(tokens)
        if right < len(tokens):
            raise EngineError(f"token {tokens[right]} was drawn, which structured_outputs does not allow there")
        text = self._text(tokens)
        if text:
            self._matcher.consume_tokens(text)
            self._bits = None
        self._over = self._over or len(text) < len(tokens)

    def valid(self, drafts: Sequence[int]) -> int:
        """How many of the leading drafts may follow. An end-of-text token is the last that may."""
        if self._over or self.problem:
            return 0
        text = self._text(drafts)
        right: int = self._matcher.validate_tokens(text) if text else 0
        if right < len(text) or right == len(drafts):
            return right
        if drafts[right] not in self._vocabulary.eos:
            return right
        self._matcher.consume_tokens(text)
        may_end = self._matcher.is_accepting()
        self._matcher.rollback(len(text))
        return right + may_end

    def places(self, drafts: Sequence[int]) -> list[AllowedTokens]:
        """What may be drawn behind the text so far, then behind each draft.

        A row is so many little-endian 32-bit words as `words_of` says, the lowest bit first. Behind the end of the
        text, behind a draft that may not follow, and where nothing may follow at all (see `problem`, which is set
        then), it allows the end-of-text tokens, or any token if there are none: a row is never empty.
        """
        vocabulary = self._vocabulary
        places = [AllowedTokens(vocabulary.row(0 if self._over else self._following()), self.ended)]
        text = self._text(drafts[: self.valid(drafts)])
        for token in text:
            self._matcher.consume_token(token)
            bits = self._compute()
            ended = self._matcher.is_stopped() or (self._matcher.is_accepting() and bits == vocabulary.end)
            places.append(AllowedTokens(vocabulary.row(bits), ended))
        if text:
            self._matcher.rollback(len(text))
        places += [AllowedTokens(vocabulary.row(0), True)] * (1 + len(drafts) - len(places))
        return places

    def _following(self) -> int:
        """Bits of what may follow now: of tokens that are text, and of the end."""
        if self._bits is None:
            self._bits = self._compute()
        if self._bits == 0 and not self.problem:
            self.problem = "no token of the model may follow what was written, and it may not end there"
        return self._bits

    def _compute(self) -> int:
        """Bits of what may follow in the matcher's state. A matcher that has failed can't be taken back."""
        mask = int.from_bytes(self._matcher.compute_bitmask(), "little")
        if self._matcher.is_error():
            self.problem = self.problem or _reason(self._matcher.get_error())
            return 0
        return mask & (self._vocabulary.text_bits | self._vocabulary.end)

    def _text(self, tokens: Sequence[int]) -> list[int]:
        """The leading tokens that are neither end-of-text nor beyond the tokenizer, which llguidance takes for a
        failure of its own."""
        vocabulary = self._vocabulary
        for place, token in enumerate(tokens):
            if token in vocabulary.eos or not 0 <= token < vocabulary.size:
                return list(tokens[:place])
        return list(tokens)


def _with_end(tokenizer_json: str) -> tuple[str, int]:
    """The tokenizer with one more special token, and that token's id: behind all others."""
    tokenizer = json.loads(tokenizer_json)
    vocab, added = tokenizer["model"]["vocab"], tokenizer.setdefault("added_tokens", [])
    ids = [token["id"] for token in added]
    end = 1 + max(*ids, *(vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]), 0)
    if isinstance(vocab, dict):  # without this the library numbers it by their count, and ids may have holes
        vocab[_END] = end
    added.append({"id": end, "content": _END, "special": True} | dict.fromkeys(_END_MATCHES, False))
    return json.dumps(tokenizer, ensure_ascii=False), end


def _reason(error: str) -> str:
    """The line of a report that says what is wrong, in this project's words where its own would lead astray."""
    lines = [line.strip() for line in error.splitlines() if line.strip()] or ["unknown"]
    reason = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])
    for start, plain in _PLAIN.items():
        if reason.startswith(start):
            return (plain + reason.removeprefix(start) if start.endswith(": ") else plain)[:300]
    return reason[:300]
