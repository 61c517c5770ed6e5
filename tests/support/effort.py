"""How much tests try: less with `scripts/test --quick`."""

quick = False  # set by tests/conftest.py, before any test is read


def examples(count: int) -> int:
    """The number of examples for hypothesis where a whole run takes `count`."""
    return max(count // 10, 5) if quick else count
