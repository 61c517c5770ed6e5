"""The commands of `shoal`. An error of any of them is one line on stderr."""

import os
import sys

import click

from shoal import __version__
from shoal.cli.bench import bench
from shoal.cli.cluster_keys import cluster_keys
from shoal.cli.completion import completion
from shoal.cli.doctor import doctor
from shoal.cli.download import download
from shoal.cli.generate import Interrupted, generate
from shoal.cli.options import unknown_flag
from shoal.cli.plan import plan
from shoal.cli.scale import scale
from shoal.cli.serve import serve
from shoal.cli.top import top
from shoal.config import engine_options
from shoal.errors import ShoalError
from shoal.log import configure_logging, get_logger


class _Sections(click.Group):
    """A group of commands whose help lists them under headings."""

    def __init__(self, *arguments: object, **keywords: object) -> None:
        super().__init__(*arguments, **keywords)  # type: ignore[arg-type]
        self.sections: dict[str, list[str]] = {}

    def add(self, section: str, *commands: click.Command) -> None:
        for command in commands:
            self.add_command(command)
            self.sections.setdefault(section, []).append(str(command.name))

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for section, names in self.sections.items():
            with formatter.section(section):
                formatter.write_dl([(name, self.commands[name].get_short_help_str(100)) for name in names])


def _dashed(name: str) -> str:
    """Allow underscores in flags, as vLLM does."""
    return name.replace("_", "-")


_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
    "token_normalize_func": _dashed,
}


@click.group(cls=_Sections, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="shoal")
def cli() -> None:
    """Serve large language models over processes, devices and hosts."""
    configure_logging()
    for warning in engine_options.strange_variables():
        get_logger("cli").warning("%s", warning)


cli.add("Run models", generate, serve)
cli.add("Decide", plan, doctor)
cli.add("Measure", bench)
cli.add("Operate", top, scale)
cli.add("Set up", download, cluster_keys, completion)


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
        command = " ".join(["shoal", *(name for name in sys.argv[1:2] if name in cli.commands)])
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
