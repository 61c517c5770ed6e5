"""Grammars for the demo model's tokenizer: which texts they allow, and random texts that obey them."""

import math
import random
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

import shoal
from shoal.structured.matcher import GrammarState, Vocabulary
from shoal.structured.schema.grammar_json import grammar_json
from shoal.structured.schema.prepare import prepare

DEMO = (Path(shoal.__file__).parent / "demo_model" / "tokenizer.json").read_text("utf-8")
END = 1
_SIZE = 640
_WHITESPACE = r"[ \t\n\r]{1,33}"
_LIKELY = set('abxyk0123456789-.+eE{}[]":,truefalsn_@TZ/ ')  # characters that random texts mostly have


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary(DEMO, (END,), _SIZE)


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_str(DEMO)


@cache
def _spelled() -> list[str]:
    return [tokenizer().decode([token], skip_special_tokens=False) for token in range(_SIZE)]


def of_schema(schema: Any, *, strict: bool = False) -> GrammarState:
    return GrammarState.compile(grammar_json(prepare(schema, strict=strict).schema, _WHITESPACE), vocabulary())


def allows(grammar: GrammarState, text: str) -> bool:
    """Return whether the grammar allows this text as a complete output."""
    tokens = (*tokenizer().encode(text, add_special_tokens=False).ids, END)
    return grammar.count_valid(tokens) == len(tokens)


def written(grammar: GrammarState, chance: random.Random, steps: int = 90) -> str | None:
    """Draw a text that the grammar allows, token by token. Return None if it has no end after `steps` tokens."""
    grammar, tokens = grammar.copy(), list[int]()
    for _ in range(steps):
        row = int.from_bytes(grammar.allowed_tokens(())[0].row, "little")
        allowed = [token for token in range(_SIZE) if row >> token & 1]
        if END in allowed and (len(allowed) <= 2 or chance.random() < 0.6):
            return tokenizer().decode(tokens, skip_special_tokens=False)
        weights = [_weight(_spelled()[token]) if token != END else 0 for token in allowed]
        if grammar.problem or not any(weights):
            return None
        (token,) = chance.choices(allowed, weights)
        grammar.accept([token])
        tokens.append(token)
    return None


def _weight(text: str) -> float:
    if not text:
        return 0
    likely = 1.0 if set(text) <= _LIKELY and text.strip() else 0.02
    return likely * (6 if text[0] in '"}]' else 1) / math.sqrt(len(text))
