"""When a step may hang."""

import pytest

from shoal.executors.step_durations import StepDurations


def test_a_step_may_hang_when_it_takes_much_longer_than_steps_like_it() -> None:
    durations = StepDurations()
    durations.note(5, 0.01)
    assert durations.limit(4) == 5.0  # not before a floor
    durations.note(6, 3.0)
    durations.note(7, 0.01)
    assert durations.limit(5) == pytest.approx(10 * 3.0 * 0.99)
    assert durations.limit(1) == pytest.approx(10 * 3.0 * 0.99)  # a smaller step than all so far


def test_the_first_step_of_a_size_has_more_time() -> None:
    durations = StepDurations()
    assert durations.limit(1) == 60.0
    durations.note(16, 1.0)
    assert durations.limit(32) == 60.0
    assert durations.limit(2048) == pytest.approx(10 * 1.0 * 128)
    assert durations.longest(32) is None


def test_a_single_slow_step_is_forgotten_with_time() -> None:
    durations = StepDurations()
    durations.note(1, 4.0)
    for _ in range(300):
        durations.note(1, 0.1)
    assert durations.limit(1) == 5.0
