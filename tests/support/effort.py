"""The effort of tests, which is less with `scripts/test --quick`."""

quick = False  # set by tests/conftest.py, before any test is read


def examples(count: int) -> int:
    """Return the number of examples for hypothesis; `count` in a full run."""
    return max(count // 10, 5) if quick else count
