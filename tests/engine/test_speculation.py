"""Drafters, and which of them a configuration asks for."""

from shoal.config.option_forms import SpeculativeConfig
from shoal.engine.speculation import ModelDrafter, NgramDrafter, make_drafters

NGRAM = SpeculativeConfig("ngram", num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=2)
DRAFT = SpeculativeConfig("draft_model", num_speculative_tokens=3, model="small")


def test_without_a_configuration_nobody_drafts() -> None:
    assert make_drafters(None)() is None


def test_each_request_has_a_drafter_of_its_own() -> None:
    for config, kind in ((NGRAM, NgramDrafter), (DRAFT, ModelDrafter)):
        make = make_drafters(config)
        first, second = make(), make()
        assert first is not second
        assert isinstance(first, kind)
        assert second is not None
        first.accept([1, 2, 9, 1, 2], (5,))
        assert first.propose(3) != ()
        assert second.propose(3) == ()


def test_ngrams_are_of_the_configured_lengths() -> None:
    drafter = NgramDrafter(NGRAM)
    drafter.accept([7, 1, 2, 3, 8, 9], ())
    drafter.accept([2], ())
    assert drafter.propose(9) == (), "a run of one token is too short"
    drafter.accept([3], ())
    assert drafter.propose(9) == (8, 9, 2, 3), "as many as are configured"
    assert drafter.propose(2) == (8, 9)
    assert drafter.propose(0) == ()


def test_ngrams_ignore_the_drafts_of_the_ranks() -> None:
    drafter = NgramDrafter(NGRAM)
    drafter.accept([1, 2, 3], (4, 5))
    assert drafter.propose(3) == ()
    assert drafter.lookahead == 0


def test_drafts_of_a_model_hold_until_tokens_come() -> None:
    drafter = ModelDrafter(DRAFT)
    assert drafter.lookahead == 3, "room in the cache for all its drafts"
    drafter.accept([1, 2, 3], ())
    assert drafter.propose(3) == ()
    drafter.accept([4], (5, 6, 7))
    assert drafter.propose(9) == (5, 6, 7)
    assert drafter.propose(2) == (5, 6)
    drafter.accept([5, 6], (8,))
    assert drafter.propose(9) == (8,)
    drafter.accept([8], ())
    assert drafter.propose(9) == ()
