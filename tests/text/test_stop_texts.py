"""The automaton of stop texts finds the same stop text as a search at every position."""

from hypothesis import given
from hypothesis import strategies as st

from shoal.params import SamplingParams
from shoal.text.prompts import Job
from shoal.text.stop_texts import StopTexts
from support.fakes import steady

TEXTS = st.lists(st.text("ab", min_size=1, max_size=5), min_size=1, max_size=8)


def first_end(text: str, texts: list[str]) -> tuple[int, str] | None:
    for end in range(1, len(text) + 1):
        found = [each for each in texts if text[:end].endswith(each)]
        if found:
            return end, max(found, key=len)
    return None


@steady
@given(TEXTS, st.text("abc", max_size=20), st.data())
def test_the_first_stop_text_is_found_in_portions_of_any_size(texts: list[str], text: str, data: st.DataObject) -> None:
    automaton = StopTexts(texts)
    state, at, found = 0, 0, None
    while at < len(text) and found is None:
        size = data.draw(st.integers(1, len(text) - at))
        state, found = automaton.read(state, text[at : at + size], may_stop=True)
        if found is None:
            at += size
    expected = first_end(text, texts)
    assert (None if found is None else (at + found[0], found[1])) == expected


@steady
@given(TEXTS, st.text("abc", max_size=20))
def test_the_number_of_characters_to_hold_back_is_known(texts: list[str], text: str) -> None:
    """It is known even after a stop text at which the search may not stop yet."""
    automaton = StopTexts(texts)
    state, found = automaton.read(0, text, may_stop=False)
    assert found is None
    beginnings = {each[:size] for each in texts for size in range(len(each))}
    expected = max(size for size in range(len(text) + 1) if text[len(text) - size :] in beginnings)
    assert automaton.held(state) == expected


def test_the_time_per_character_does_not_depend_on_the_number_of_stop_texts() -> None:
    """A search makes one step for each character."""
    texts = [f"{i:04d}" * 4 for i in range(1000)]
    automaton = StopTexts(texts)
    steps = 0
    step = automaton.step

    def counted(state: int, character: int) -> int:
        nonlocal steps
        steps += 1
        return step(state, character)

    automaton.step = counted  # type: ignore[method-assign]
    automaton.read(0, "0123" * 1000 + "0", may_stop=False)
    assert steps == 4001


def test_outputs_and_prompts_with_the_same_stop_texts_share_one_automaton() -> None:
    params = SamplingParams(stop=["a", "b"], stop_token_ids=[5, 6])
    first, second = Job(0, None, (1,), params), Job(1, None, (2,), params)
    assert first.stop_texts is second.stop_texts is not None
    assert first.stop_ids is second.stop_ids
    assert Job(0, None, (1,), SamplingParams()).stop_texts is None
