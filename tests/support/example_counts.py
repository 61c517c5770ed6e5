"""The number of examples that tests try, which is lower with `scripts/test --quick`."""

quick = False  # set by tests/conftest.py, before any test is read


def examples(count: int) -> int:
    """Return the number of examples for Hypothesis. A full run takes `count`."""
    return max(count // 10, 5) if quick else count
