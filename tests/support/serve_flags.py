"""The flags that `shoal serve` knows, for tests of files that have its command lines."""

from collections.abc import Iterable

from shoal.cli.serve import serve


def unknown_flags(words: Iterable[str]) -> set[str]:
    """Return the flags among `words` that `shoal serve` does not know."""
    known = {flag for parameter in serve.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return {flag for word in words if (flag := word.partition("=")[0]).startswith("-") and flag not in known}
