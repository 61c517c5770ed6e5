"""Who guesses what follows."""

from shoal.config.engine_options import SpeculativeConfig
from shoal.engine.speculation import ModelGuesser, NgramGuesser, make_guessers

NGRAM = SpeculativeConfig("ngram", num_speculative_tokens=4, prompt_lookup_max=3, prompt_lookup_min=2)
DRAFT = SpeculativeConfig("draft_model", num_speculative_tokens=3, model="small")


def test_without_a_configuration_nobody_guesses() -> None:
    assert make_guessers(None)() is None


def test_each_request_has_a_guesser_of_its_own() -> None:
    for config, kind in ((NGRAM, NgramGuesser), (DRAFT, ModelGuesser)):
        make = make_guessers(config)
        first, second = make(), make()
        assert first is not second
        assert isinstance(first, kind)
        assert second is not None
        first.accept([1, 2, 9, 1, 2], (5,))
        assert first.guess(3) != ()
        assert second.guess(3) == ()


def test_ngrams_are_of_the_configured_lengths() -> None:
    guesser = NgramGuesser(NGRAM)
    guesser.accept([7, 1, 2, 3, 8, 9], ())
    guesser.accept([2], ())
    assert guesser.guess(9) == (), "a run of one token is too short"
    guesser.accept([3], ())
    assert guesser.guess(9) == (8, 9, 2, 3), "as many as are configured"
    assert guesser.guess(2) == (8, 9)
    assert guesser.guess(0) == ()


def test_what_the_ranks_guess_besides_is_not_looked_at_by_ngrams() -> None:
    guesser = NgramGuesser(NGRAM)
    guesser.accept([1, 2, 3], (4, 5))
    assert guesser.guess(3) == ()
    assert guesser.lookahead == 0


def test_a_draft_models_guesses_hold_until_tokens_come() -> None:
    guesser = ModelGuesser(DRAFT)
    assert guesser.lookahead == 3, "room in the cache for all it guesses"
    guesser.accept([1, 2, 3], ())
    assert guesser.guess(3) == ()
    guesser.accept([4], (5, 6, 7))
    assert guesser.guess(9) == (5, 6, 7)
    assert guesser.guess(2) == (5, 6)
    guesser.accept([5, 6], (8,))
    assert guesser.guess(9) == (8,)
    guesser.accept([8], ())
    assert guesser.guess(9) == ()
