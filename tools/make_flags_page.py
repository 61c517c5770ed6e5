"""Write docs/flags.md, the page of all flags and environment variables, from the code that reads them.

Run `python tools/make_flags_page.py` after a flag has changed; a test fails while the page is stale.
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

from shoal import env
from shoal.cli.commands import cli
from shoal.cli.options import flag_groups, group_of
from shoal.config import engine_options, vllm_options

PAGE = Path(__file__).resolve().parent.parent / "docs" / "flags.md"

_HEAD = """# Flags and environment variables

Made from the code by `tools/make_flags_page.py`.

## Which value counts

The first of these that has a value:

1. A prompt's own `sampling_params`, or the body of its request.
2. Flags on the command line; for `LLM(...)` its arguments.
3. Environment variables: `SHOAL_<OPTION>` for every option of the engine, then vLLM's name if the table has one. An
   empty variable counts as not set; a `SHOAL_` variable that nothing reads gives a warning. `LLM(...)` reads them, too.
4. The file of `--config`, which `LLM(...)` does not have.
5. For sampling, the model's `generation_config.json`, unless `--generation-config vllm`.
6. The defaults below. A request in OpenAI's batch format has OpenAI's: temperature 1, 16 tokens for a completion, as
   many as fit for a chat.

A config file is YAML. Its keys are any flags of the command, and MODEL, without dashes in front and with `-` or `_`
between words; a flag that may be given several times takes a list, one that takes JSON a mapping:

```yaml
model: Qwen/Qwen3-0.6B
tensor-parallel-size: 2
kv_cache_memory_bytes: 2GiB
stop: ["\\n\\n", "User:"]
speculative-config: {method: ngram, num_speculative_tokens: 4}
```
"""


def page() -> str:
    return "\n".join([_HEAD, *_commands(), *_shared(), *_variables(), *_lacking()]).rstrip() + "\n"


def commands(command: click.Command = cli, name: str = "shoal") -> Iterator[tuple[str, click.Command]]:
    """Yield (full name, command) of all commands, without groups."""
    if not isinstance(command, click.Group):
        yield name, command
        return
    context = click.Context(command)
    for inner in command.list_commands(context):
        found = command.get_command(context, inner)
        assert found is not None
        yield from commands(found, f"{name} {inner}")


def _commands() -> Iterator[str]:
    for name, command in commands():
        arguments = "".join(f" {p.make_metavar(click.Context(command))}" for p in command.params if _positional(p))
        groups = ", ".join(flag_groups(command))
        yield f"## `{name}{arguments}`\n\n{_plain(command.get_short_help_str(200))}\n"
        own = [p for p in command.params if isinstance(p, click.Option) and group_of(p) is None]
        if own:
            yield from _table(own, {})
        if groups:
            yield f"and the flags of {groups}, below.\n"


def _positional(parameter: click.Parameter) -> bool:
    return isinstance(parameter, click.Argument)


def _shared() -> Iterator[str]:
    shown: dict[str, list[click.Parameter]] = {}
    for _, command in commands():
        for group, flags in flag_groups(command).items():  # `shoal serve` has more of them than other commands
            shown[group] = max(shown.get(group, []), flags, key=len)
    variables = {option.name: env.option_variable(option.name) for option in engine_options.options()}
    for group, parameters in shown.items():
        yield f"## {group}\n"
        options = [p for p in parameters if isinstance(p, click.Option)]
        yield from _table(options, variables if hasattr(options[0], "option") else {})


def _table(flags: list[click.Option], variables: dict[str, str]) -> Iterator[str]:
    last = "| environment variable " if variables else ""
    yield f"| flag | what it does {last}|\n|---|---|{'---|' if variables else ''}"
    for flag in flags:
        record = None if flag.hidden else flag.get_help_record(click.Context(click.Command("shoal")))
        if record is not None:
            names, help_ = record
            variable = f" `{variables[flag.name]}` |" if variables and flag.name else ""
            yield f"| `{_plain(names)}` | {_unlinked(_plain(help_))} |{variable}"
    yield ""


def _variables() -> Iterator[str]:
    yield "## Other environment variables\n\n| variable | vLLM's name | what it does |\n|---|---|---|"
    for variable in env.SETTINGS:
        yield f"| `{variable.name}` | {f'`{variable.alias}`' if variable.alias else ''} | {_plain(variable.help)} |"
    yield "\nvLLM's names of engine options:\n\n| option | vLLM's name |\n|---|---|"
    for name, alias in env.OPTION_ALIASES.items():
        yield f"| `{env.option_variable(name)}` | `{alias}` |"


def _lacking() -> Iterator[str]:
    yield "\n## Flags of vLLM that Shoal does not have\n\n| flag | what to do |\n|---|---|"
    for name, way in vllm_options.LACKING.items():
        yield f"| `--{name.replace('_', '-')}` | {_plain(way) or 'not yet'} |"


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def _unlinked(text: str) -> str:
    """Return a text with escaped brackets, since Markdown may read those around defaults and ranges as links."""
    return text.replace("[", "\\[")


def main(arguments: Sequence[str] | None = None) -> None:
    argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0]).parse_args(arguments)
    PAGE.write_text(page(), "utf-8")
    print(f"written: {PAGE}")


if __name__ == "__main__":
    main()
