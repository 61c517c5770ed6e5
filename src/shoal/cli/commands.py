"""The commands of `shoal`. An error of any of them is one line on stderr.

A command is imported when it runs, so that none takes the time that the imports of the others take.
"""

import os
import sys

import click

from shoal import __version__
from shoal.cli.interrupts import Interrupted
from shoal.cli.options import unknown_flag
from shoal.config import engine_options
from shoal.errors import ShoalError
from shoal.lazy import load
from shoal.log import configure_logging, get_logger

_SECTIONS = {
    "Run models": {"generate": "shoal.cli.generate:generate", "serve": "shoal.cli.serve:serve"},
    "Decide": {"plan": "shoal.cli.plan:plan", "doctor": "shoal.cli.doctor:doctor"},
    "Measure": {"bench": "shoal.cli.bench:bench"},
    "Operate": {"top": "shoal.cli.top:top", "scale": "shoal.cli.scale:scale"},
    "Set up": {
        "download": "shoal.cli.download:download",
        "cluster-keys": "shoal.cli.cluster_keys:cluster_keys",
        "completion": "shoal.cli.completion:completion",
    },
}
_PATHS = {name: path for section in _SECTIONS.values() for name, path in section.items()}


class _LazyCommands(click.Group):
    """The group of all commands, each of which is imported when it is asked for. The help lists them under headings."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_PATHS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        return self._command(cmd_name) if cmd_name in _PATHS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, names in _SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name, self._command(name).get_short_help_str(100)) for name in names])

    def _command(self, name: str) -> click.Command:
        found: click.Command = load(_PATHS[name])
        return found


def _dashed(name: str) -> str:
    """Allow underscores in flags, as vLLM does."""
    return name.replace("_", "-")


_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
    "token_normalize_func": _dashed,
}


@click.group(cls=_LazyCommands, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="shoal")
def cli() -> None:
    """Serve large language models over processes, devices and hosts."""
    configure_logging()
    for warning in engine_options.strange_variables():
        get_logger("cli").warning("%s", warning)


def every_command() -> dict[str, click.Command]:
    """Return all commands by name."""
    return {name: load(path) for name, path in _PATHS.items()}


def run() -> int:
    """Run the command and return its exit code.

    The code is 0 (done), 1 (the engine or a prompt failed), 2 (an error that the caller can correct) or 130
    (interrupted).

    Raises:
        KeyboardInterrupt: before the command could say how to go on.
    """
    try:
        return cli.main(standalone_mode=False) or 0
    except click.ClickException as error:  # click prints the usage, too; our errors are one line
        message = unknown_flag(error, sys.argv[1:]) if isinstance(error, click.NoSuchOption) else error.format_message()
        what = " ".join(message.split()).rstrip(".")
        command = " ".join(["shoal", *(name for name in sys.argv[1:2] if name in _PATHS)])
        print(f"error: {what}; see {command} --help", file=sys.stderr)
        return error.exit_code
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return error.exit_code
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # the reader of the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.Abort:
        raise KeyboardInterrupt from None
