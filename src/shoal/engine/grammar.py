"""Masks for constrained decoding: which tokens may follow, so that an output obeys a grammar. By llguidance.

The library knows one end-of-text token and models have several, or none. So it is told of a token beyond every
vocabulary, which is never drawn; where it allows that one, every end-of-text token of the model is allowed.
"""

import json
from collections import OrderedDict
from collections.abc import Callable, Sequence

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from shoal.errors import EngineError, RequestError
from shoal.wire import Ids

_WORD = 4  # bytes
_KEPT = 32  # compiled grammars
_KEPT_CHARACTERS = 2 << 20  # ... that are so large together: compiled, a character takes a hundred bytes
_LONGEST = 1 << 20  # characters of a grammar: a second of compiling or so
_END = "<|shoal:end|>"
_END_MATCHES = ("single_word", "lstrip", "rstrip", "normalized")
_PLAIN = {
    "NoExtension": "no text satisfies it",
    "Unsatisfiable schema: ": "no text satisfies the schema: ",
    "Unimplemented keys: ": "unsupported keywords of a JSON schema: ",
    "oneOf constraints": "oneOf is supported only where no value satisfies two of its schemas; use anyOf",
}
# So much that a choice of twenty thousand texts is compiled, and that nothing takes more than a second.
_LIMITS = LLParserLimits(verbose_errors=False, initial_lexer_fuel=300_000)


class Grammars:
    """Compiles grammars for one model. The tokenizer is built when the first one comes.

    Args:
        tokenizer_json: gives the text of the model's `tokenizer.json`.
        eos: the model's end-of-text tokens; may be empty.
        vocab_size: the model's, which may be larger than the tokenizer's (the rest is never allowed) or smaller.
    """

    def __init__(self, tokenizer_json: Callable[[], str], eos: Ids, vocab_size: int) -> None:
        self.words = -(-vocab_size // 32)  # 32-bit words in a row of a mask
        self._tokenizer_json = tokenizer_json
        self._vocabulary: _Vocabulary | None = None
        self._eos = tuple(token for token in eos if token < vocab_size)
        self._vocab_size = vocab_size
        self._compiled: OrderedDict[str, Grammar] = OrderedDict()

    def compile(self, grammar: str) -> "Grammar":
        """A fresh state of `grammar`, which is in llguidance's form. The same text is compiled once.

        Raises:
            RequestError: it is no grammar, no text satisfies it, or the vocabulary can't spell one that does.
        """
        known = self._compiled.get(grammar)
        if known is None:
            known = self._compiled[grammar] = self._compile(grammar)
            while len(self._compiled) > 1 and (len(self._compiled) > _KEPT or self._characters() > _KEPT_CHARACTERS):
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(grammar)
        return known.fresh()

    def _characters(self) -> int:
        return sum(map(len, self._compiled))

    def _compile(self, text: str) -> "Grammar":
        if len(text) > _LONGEST:
            raise RequestError(
                f"structured_outputs is too large: {len(text)} characters, of which {_LONGEST} are allowed; "
                f"shorten the schema or grammar"
            )
        if self._vocabulary is None:
            self._vocabulary = _Vocabulary(self._tokenizer_json(), self._eos, self._vocab_size)
        matcher = LLMatcher(self._vocabulary.tokenizer, text, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise RequestError(f"structured_outputs can't be used: {_reason(matcher.get_error())}")
        grammar = Grammar(matcher, self._vocabulary)
        grammar.masks(())  # finds out whether there is a first token, and builds the lexer for all copies
        if grammar.problem:
            raise RequestError(f"structured_outputs can't be obeyed: {grammar.problem}")
        return grammar


class _Vocabulary:
    """A tokenizer as llguidance knows it, and the end-of-text tokens as it doesn't."""

    def __init__(self, tokenizer_json: str, eos: Ids, vocab_size: int) -> None:
        try:
            text, self.size = _with_end(tokenizer_json)
            self.tokenizer = LLTokenizer(text, eos_token=self.size)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RequestError(f"structured_outputs can't read the model's tokenizer: {_reason(str(error))}") from error
        self.eos = frozenset(eos)
        self.end = 1 << self.size  # the bit of the token that stands for the end
        self.eos_bits = sum(1 << token for token in self.eos)
        self.text_bits = ((1 << min(vocab_size, self.size)) - 1) & ~self.eos_bits
        self.row_bytes = -(-vocab_size // 32) * _WORD
        # Behind the end: what an engine draws there is dropped, but a row must allow something.
        self.at_end = self.eos_bits or self.text_bits

    def row(self, bits: int) -> bytes:
        """Of bits as `Grammar` has them, in which `end` says that the text may end."""
        allowed = bits & self.text_bits | (self.eos_bits if bits & self.end else 0)
        return (allowed or self.at_end).to_bytes(self.row_bytes, "little")


class Grammar:
    """What one request has written so far, seen by its grammar."""

    def __init__(self, matcher: LLMatcher, vocabulary: _Vocabulary) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._bits: int | None = None  # what may follow now, where it is known
        self._over = False  # an end-of-text token was drawn
        self.problem = ""  # why the text can't be brought to an end that the grammar accepts

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
        """`tokens` were drawn. Where there is a problem they do not count.

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

    def masks(self, drafts: Sequence[int]) -> bytes:
        """Rows of which tokens may be drawn: behind the text so far, then behind each draft.

        A row is `Grammars.words` little-endian 32-bit words, the lowest bit first. Behind the end of the text, behind
        a draft that may not follow, and where nothing may follow at all (see `problem`, which is set then), it allows
        the end-of-text tokens, or any token if there are none: a row is never empty.
        """
        vocabulary = self._vocabulary
        rows = [vocabulary.row(0 if self._over else self._following())]
        text = self._text(drafts[: self.valid(drafts)])
        for token in text:
            self._matcher.consume_token(token)
            rows.append(vocabulary.row(self._compute()))
        if text:
            self._matcher.rollback(len(text))
        rows += [vocabulary.row(0)] * (1 + len(drafts) - len(rows))
        return b"".join(rows)

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
        """The leading ones that are neither an end-of-text token nor beyond the tokenizer, which llguidance takes
        for a failure of its own."""
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
