"""Command line flags for every engine option, made from the config classes, and help that shows them by group."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import click

from shoal import env
from shoal.cli.config_file import read_config_file
from shoal.cli.numbers import AnyNumber, Integer
from shoal.config import engine_options, vllm_options
from shoal.config.option import Option
from shoal.values import closest

F = Callable[..., Any]


class Plain(click.ParamType):  # type: ignore[type-arg]
    """A value that stays a text; its option reads it later."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return value


class Choice(click.Choice[str]):
    """A choice whose values are taken as they are written; only flags may have underscores for dashes."""

    def normalize_choice(self, choice: object, ctx: click.Context | None) -> str:
        return str(choice)


_KINDS: dict[type, Any] = {int: Integer(), float: AnyNumber(), str: str, bool: bool}


class EngineFlag(click.Option):
    """The flag of an engine option."""

    def __init__(self, option: Option) -> None:
        names = [option.name, option.flag, *([option.short] if option.short else [])]
        plain = option.bytes or option.parse is not None
        kind: Any = Plain() if plain else Choice(option.choices) if option.choices else _KINDS[option.type]
        shown = "" if option.default is None else f" [default: {option.default}]"
        if option.type is bool:
            names[1] = f"{option.flag}/--no-{option.name.replace('_', '-')}"
        super().__init__(
            names,
            type=None if option.type is bool else kind,
            default=None,
            help=option.help + shown,
            metavar="BYTES" if option.bytes else option.metavar,
        )
        self.option = option
        self.group = option.group


class AcceptedFlag(click.Option):
    """A flag of vLLM's that is accepted although it changes nothing."""

    group = "Flags of vLLM"

    def __init__(self, found: vllm_options.Accepted) -> None:
        flag = f"{found.flag}/--no-{found.flag[2:]}" if found.is_switch else found.flag
        super().__init__(
            [found.name, flag],
            type=None if found.is_switch else Plain(),
            default=None,
            help=found.note,
            metavar=None if found.is_switch else found.metavar,
        )


def engine_flags(command: F) -> F:
    """Add a flag for every option of an engine. The command gets them as keywords; None means not given."""
    return _add_flags(command, [option for option in engine_options.options() if not option.online], server=False)


def serving_flags(command: F) -> F:
    """Add the flags of `engine_flags`, and those for `shoal serve` only."""
    return _add_flags(command, list(engine_options.options()), server=True)


def cluster_tls_flags(command: F) -> F:
    """Add the flags of `ClusterTlsOptions`, also read from their variables. The command gets them as keywords."""
    names = {each.name for each in dataclasses.fields(engine_options.ClusterTlsOptions)}
    for option in reversed([option for option in engine_options.options() if option.name in names]):
        variable = env.option_variable(option.name)
        click.option(option.flag, option.name, help=option.help, metavar=option.metavar, envvar=variable)(command)
    return command


def _add_flags(command: F, options: list[Option], *, server: bool) -> F:
    flags: list[click.Option] = [EngineFlag(option) for option in options]
    flags += [AcceptedFlag(each) for each in vllm_options.options(server=server)]
    for flag in reversed(flags):
        click.decorators._param_memo(command, flag)
    return command


def engine_values(flags: dict[str, Any]) -> dict[str, Any]:
    """Return the engine options that were given among a command's keywords, and those of vLLM's that change nothing."""
    names = {option.name for option in engine_options.options()} | {each.name for each in vllm_options.TABLE}
    return {name: value for name, value in flags.items() if name in names and value is not None}


def unknown_flag(error: click.NoSuchOption, arguments: Sequence[str]) -> str:
    """Return the message about a flag that the command does not have.

    It says what to do instead of a flag of vLLM's, or names the closest flag.
    """
    parameters = error.ctx.command.get_params(error.ctx) if error.ctx is not None else []
    name = error.option_name
    if not name.startswith("--"):  # of a short flag, click knows only the first letter
        name = next((each for each in arguments if each.startswith(name)), name)
    if any(isinstance(parameter, EngineFlag) for parameter in parameters):
        explanation = vllm_options.explain(name) or vllm_options.explain(error.option_name)
        if explanation:
            return explanation
    known = [
        flag for each in parameters if isinstance(each, click.Option) for flag in (*each.opts, *each.secondary_opts)
    ]
    dashed = [flag for flag in known if flag.lstrip("-") == name.lstrip("-")]
    near = dashed[0] if dashed else closest(name, [flag for flag in known if flag.startswith("--")])
    return f"there is no flag {name}{f' (did you mean {near}?)' if near else ''}"


class GroupedCommand(click.Command):
    """A command whose help shows its own flags, and a line for each group of the others; `--help=GROUP` shows a group.

    Where a flag is not given, an environment variable is read, and then the file of `--config`.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._grouped_help: click.Option | None = None
        own = sum(1 for parameter in self.params if group_of(parameter) is None)
        self.params.insert(
            own,
            click.Option(
                ["--config"],
                metavar="FILE",
                is_eager=True,
                expose_value=False,
                callback=self._set_defaults,
                help="a YAML file with flags and their values; the command line and environment variables override it",
            ),
        )

    def get_help_option(self, ctx: click.Context) -> click.Option | None:
        if self._grouped_help is None:
            self._grouped_help = click.Option(
                ["-h", "--help"],
                is_flag=False,
                flag_value="",
                is_eager=True,
                expose_value=False,
                callback=self._show_help,
                metavar="[=GROUP]",
                help="show this message, or a group of flags; --help=all shows every flag",
            )
        return self._grouped_help

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        self._write(ctx, formatter, None)
        groups = flag_groups(self)
        if groups:
            with formatter.section("More flags, shown by --help=GROUP"):
                formatter.write_dl([(_key(name), _summary(name, flags)) for name, flags in groups.items()])

    def _show_help(self, ctx: click.Context, _: click.Parameter, wanted: str | None) -> None:
        if wanted is None or ctx.resilient_parsing:
            return
        if not wanted:
            click.echo(self.get_help(ctx))
        else:
            formatter = ctx.make_formatter()
            for name in [None, *flag_groups(self)] if wanted == "all" else [self._group(wanted)]:
                self._write(ctx, formatter, name)
            click.echo(formatter.getvalue().rstrip())
        ctx.exit()

    def _group(self, wanted: str) -> str:
        names = list(flag_groups(self))
        for name in names:
            if any(_plain(part).startswith(_plain(wanted)) for part in (name, *name.split())) and _plain(wanted):
                return name
        known = ", ".join([*map(_key, names), "all"])
        raise click.UsageError(f"there is no group of flags {wanted!r}; known are {known}")

    def _write(self, ctx: click.Context, formatter: click.HelpFormatter, group: str | None) -> None:
        flags = [f for f in self.get_params(ctx) if isinstance(f, click.Option) and group_of(f) == group]
        records = [record for flag in flags if (record := flag.get_help_record(ctx))]
        with formatter.section(group or "Options"):
            formatter.write_dl(records)

    def _set_defaults(self, ctx: click.Context, _: click.Parameter, file: str | None) -> None:
        if ctx.resilient_parsing:
            return
        known = {f.option.name for f in self.params if isinstance(f, EngineFlag)}
        variables = {
            name: value for name, value in engine_options.from_environment(online=True).items() if name in known
        }
        ctx.default_map = {**(read_config_file(file, self.params) if file is not None else {}), **variables}


def group_of(parameter: click.Parameter) -> str | None:
    """Return the group of a flag; None if it is one of the command's own flags."""
    found: str | None = getattr(parameter, "group", None)
    return found


def flag_groups(command: click.Command) -> dict[str, list[click.Parameter]]:
    groups: dict[str, list[click.Parameter]] = {}
    for parameter in command.params:
        name = group_of(parameter)
        if name is not None:
            groups.setdefault(name, []).append(parameter)
    return groups


def _summary(name: str, flags: list[click.Parameter]) -> str:
    shown = ", ".join(flag.opts[0] for flag in flags[:3])
    return f"{name}: {shown}{f' and {len(flags) - 3} more' if len(flags) > 3 else ''}"


def _key(name: str) -> str:
    """Return the name of a group for `--help=`: `KV cache` -> `cache`."""
    return name.rsplit(maxsplit=1)[-1].lower()


def _plain(text: str) -> str:
    return "".join(filter(str.isalnum, text.lower()))
