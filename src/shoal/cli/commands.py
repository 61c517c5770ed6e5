"""The commands of `shoal`, and what their errors look like: one line."""

import os
import sys

import click

from shoal import __version__
from shoal.cli.bench import bench
from shoal.cli.completion import completion
from shoal.cli.download import download
from shoal.cli.generate import Interrupted, generate
from shoal.cli.plan import plan
from shoal.cli.scale import scale
from shoal.cli.serve import serve
from shoal.cli.top import top
from shoal.config import engine_options
from shoal.errors import ShoalError
from shoal.log import configure_logging, get_logger


class _Sections(click.Group):
    """Lists its commands under headings."""

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
    """Flags may be written with underscores, as vLLM takes them."""
    return name.replace("_", "-")


_CONTEXT = {
    "help_option_names": ["-h", "--help"],
    "max_content_width": 120,
    "token_normalize_func": _dashed,
}


@click.group(cls=_Sections, context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="shoal")
def cli() -> None:
    """Serves large language models across processes, devices and machines."""
    configure_logging()
    for warning in engine_options.strange_variables():
        get_logger("cli").warning("%s", warning)


cli.add("Run models", generate, serve)
cli.add("Decide", plan)
cli.add("Measure", bench)
cli.add("Operate", top, scale)
cli.add("Set up", download, completion)


def run() -> int:
    """Gives the exit code: 0: done; 1: the engine failed or a prompt did; 2: something the caller can mend; 130:
    interrupted.

    Raises:
        KeyboardInterrupt: before a command has had a chance to say how to go on.
    """
    try:
        return cli.main(standalone_mode=False) or 0
    except click.ClickException as error:  # click tells the usage before the error; ours is one line, like every other
        what = " ".join(error.format_message().split()).rstrip(".")
        command = " ".join(["shoal", *(name for name in sys.argv[1:2] if name in cli.commands)])
        print(f"error: {what}; see {command} --help", file=sys.stderr)
        return error.exit_code
    except Interrupted as error:
        print(f"interrupted: {error}", file=sys.stderr)
        return error.exit_code
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except click.Abort:
        raise KeyboardInterrupt from None
