"""Drafters, and which of them a configuration selects."""

from shoal.config.option_forms import SpeculativeConfig
from shoal.engine.speculation import ModelDrafter, NgramDrafter, make_drafters

NGRAM = SpeculativeConfig("ngram", num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=2)
DRAFT = SpeculativeConfig("draft_model", num_speculative_tokens=3, model="small")


def test_without_a_configuration_there_are_no_drafters() -> None:
    assert make_drafters(None)() is None


def test_each_request_has_a_separate_drafter() -> None:
    for config, kind in ((NGRAM, NgramDrafter), (DRAFT, ModelDrafter)):
        make = make_drafters(config)
        first, second = make(), make()
        assert first is not second
        assert isinstance(first, kind)
        assert second is not None
        first.accept([1, 2, 9, 1, 2], (5,))
        assert first.propose(3) != ()
        assert second.propose(3) == ()


def test_ngrams_have_the_configured_lengths() -> None:
    drafter = NgramDrafter(NGRAM)
    drafter.accept([7, 1, 2, 3, 8, 9], ())
    drafter.accept([2], ())
    assert drafter.propose(9) == (), "an n-gram of one token is too short"
    drafter.accept([3], ())
    assert drafter.propose(9) == (8, 9, 2, 3), "the configured number of drafts"
    assert drafter.propose(2) == (8, 9)
    assert drafter.propose(0) == ()


def test_the_ngram_drafter_ignores_drafts_of_ranks() -> None:
    drafter = NgramDrafter(NGRAM)
    drafter.accept([1, 2, 3], (4, 5))
    assert drafter.propose(3) == ()
    assert drafter.lookahead == 0


def test_drafts_of_a_model_are_valid_until_tokens_come() -> None:
    drafter = ModelDrafter(DRAFT)
    assert drafter.lookahead == 3, "there must be room in the cache for all drafts"
    drafter.accept([1, 2, 3], ())
    assert drafter.propose(3) == ()
    drafter.accept([4], (5, 6, 7))
    assert drafter.propose(9) == (5, 6, 7)
    assert drafter.propose(2) == (5, 6)
    drafter.accept([5, 6], (8,))
    assert drafter.propose(9) == (8,)
    drafter.accept([8], ())
    assert drafter.propose(9) == ()
