"""Command line flags for every engine option, made from the config classes."""

from collections.abc import Callable
from typing import Any

import click

from shoal import config

F = Callable[..., Any]


class GroupedCommand(click.Command):
    """Lists its flags under the headings of the config classes; its own come first."""

    def format_options(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(context):
            record = parameter.get_help_record(context)
            if record is not None:
                groups.setdefault(getattr(parameter, "group", "Options"), []).append(record)
        for heading, records in groups.items():
            with formatter.section(heading):
                formatter.write_dl(records)


class _EngineFlag(click.Option):
    def __init__(self, option: config.Option) -> None:
        names = [option.name, option.flag, *([option.short] if option.short else [])]
        kind: Any = str if option.bytes else click.Choice(option.choices) if option.choices else option.type
        shown = "" if option.default is None else f" [default: {option.default}]"
        if option.type is bool:
            names[1] = f"{option.flag}/--no-{option.name.replace('_', '-')}"
        super().__init__(
            names,
            type=None if option.type is bool else kind,
            default=None,
            help=option.help + shown,
            metavar="BYTES" if option.bytes else None,
        )
        self.group = option.group


def engine_flags(command: F) -> F:
    """Adds a flag for every option. The command gets those that were given, as keywords, and the others as None."""
    for option in reversed(list(config.options())):
        click.decorators._param_memo(command, _EngineFlag(option))
    return command


def engine_values(flags: dict[str, Any]) -> dict[str, Any]:
    """The engine options among a command's keywords that were given."""
    names = {option.name for option in config.options()}
    return {name: value for name, value in flags.items() if name in names and value is not None}
