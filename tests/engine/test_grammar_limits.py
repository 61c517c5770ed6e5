"""What a grammar may cost before a request has drawn a token, and what those that are kept cost."""

import pytest

from shoal.engine import grammar
from shoal.engine.grammar import Grammars
from shoal.errors import RequestError
from shoal.frontend.hub import BUNDLED
from shoal.frontend.structured import grammar_text
from shoal.frontend.tokenizer import open_tokenizer
from shoal.types import StructuredOutputsParams


def grammars() -> Grammars:
    tokenizer = open_tokenizer(BUNDLED)
    assert tokenizer is not None
    return Grammars(tokenizer.serialized, (1,), 640)


def test_a_large_choice_is_taken() -> None:
    choice = StructuredOutputsParams(choice=[f"label {i}" for i in range(20_000)])
    assert not grammars().compile(grammar_text(choice).text).problem


@pytest.mark.parametrize("regex", ["(a|b|ab)*" * 5000, "(" * 5000 + "a" + ")" * 5000])
def test_an_expression_with_too_many_states_is_refused(regex: str) -> None:
    with pytest.raises(RequestError, match="can't be used"):
        grammars().compile(grammar_text(StructuredOutputsParams(regex=regex)).text)


def test_large_grammars_are_not_kept_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    made = grammars()
    monkeypatch.setattr(grammar, "_KEPT_CHARACTERS", 1000)
    texts = [grammar_text(StructuredOutputsParams(choice=[letter * 400])).text for letter in "abcd"]
    for text in texts:
        made.compile(text)
    compiled: list[str] = []
    compile_ = made._compile

    def note(text: str) -> grammar.Grammar:
        compiled.append(text)
        return compile_(text)

    monkeypatch.setattr(made, "_compile", note)
    for text in reversed(texts):
        made.compile(text)
    assert texts[-1] not in compiled
    assert compiled
