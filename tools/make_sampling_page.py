"""Write docs/sampling.md, the page of all sampling parameters, from the table of `SamplingParams`.

Run `python tools/make_sampling_page.py` after a parameter has changed; a test fails while the page is stale.
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from shoal.parameter_forms import UnsupportedParameter
from shoal.params import SAMPLING_TABLE
from shoal.sampling_table import Endpoint, SamplingParameter

PAGE = Path(__file__).resolve().parent.parent / "docs" / "sampling.md"

_HEAD = """# Sampling parameters

Made from the code by `tools/make_sampling_page.py`.

These are the fields of `SamplingParams`. Lines of a job file have them under `sampling_params`, `shoal generate` has
them as flags, and HTTP requests as fields of the body: "yes" in a column says that the field has the same name there.
Structured outputs have more names: `response_format` in completions and chats, `text.format` in responses,
`guided_json` and so on in all of them, and `--json-schema`, `--regex`, `--choice` and `--grammar` on the command line.
A chat may have `max_tokens` instead of `max_completion_tokens`, and needs `logprobs: true` beside `top_logprobs`.

If a request or command gives no value, the model's `generation_config.json` counts, then the default below. Commands
are greedy and stop after 64 tokens; chats and responses over HTTP go on for as many tokens as fit.

| parameter | what it does | values | default | flag | completions | chat | responses |
|---|---|---|---|---|---|---|---|
"""
_EXTRA_ARGS = """
## Values of your own

`extra_args` takes any object. Shoal keeps it with the parameters, where a program that wraps the engine can read it,
and reads none of its keys. The same field in an HTTP request (vLLM's `vllm_xargs`) could have no effect: a request with
a key in it is refused, and the error names the key.
"""


def page() -> str:
    supported = [row for row in SAMPLING_TABLE.values() if not isinstance(row.form, UnsupportedParameter)]
    lines = [
        f"| `{row.name}` | {_plain(row.help)} | {_plain(str(row.form))} | {_default(row)} | {_flag(row)} | "
        f"{' | '.join(_names(row))} |"
        for row in supported
    ]
    return _HEAD + "\n".join(lines) + "\n" + _EXTRA_ARGS + "\n".join(_unsupported())


def _unsupported() -> Iterator[str]:
    yield "\n## Parameters of vLLM that Shoal does not have\n"
    yield "| parameter | what it would do | why not, and what to do |\n|---|---|---|"
    for row in SAMPLING_TABLE.values():
        if isinstance(row.form, UnsupportedParameter):
            yield f"| `{row.name}` | {_plain(row.help)} | {_plain(row.form.instead)} |"
    yield ""


def _default(row: SamplingParameter) -> str:
    return "" if row.default is None or row.default == () else f"`{row.default}`"


def _flag(row: SamplingParameter) -> str:
    return "" if row.flag is None else f"`--{row.flag}`"


def _names(row: SamplingParameter) -> Iterator[str]:
    endpoints: tuple[Endpoint, ...] = ("completions", "chat", "responses")
    for endpoint in endpoints:
        name = row.http.get(endpoint)
        yield "" if name is None else "yes" if name == row.name else f"`{name}`"


def _plain(text: str) -> str:
    """Return a text for a cell of a table, whose brackets are not links."""
    return text.replace("|", "\\|").replace("[", "\\[")


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    PAGE.write_text(page(), "utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
