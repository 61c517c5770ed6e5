"""`shoal`: one command, errors in one line."""

import os
import signal
import sys

import click

from shoal import __version__
from shoal.cli.bench import bench
from shoal.cli.generate import generate
from shoal.errors import ShoalError
from shoal.observe import logging


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(__version__, prog_name="shoal")
def cli() -> None:
    """Serves large language models across processes, devices and machines."""
    logging.configure()


cli.add_command(generate)
cli.add_command(bench)


def main() -> None:
    """Exit code 0: done; 1: the engine failed or a prompt did; 2: something the caller can mend; 130: interrupted."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        sys.exit(cli.main(standalone_mode=False) or 0)
    except click.ClickException as error:  # click tells the usage before the error; ours is one line, like every other
        what = " ".join(error.format_message().split()).rstrip(".")
        command = " ".join(["shoal", *(name for name in sys.argv[1:2] if name in cli.commands)])
        print(f"error: {what}; see {command} --help", file=sys.stderr)
        sys.exit(error.exit_code)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:  # whoever read the output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (click.Abort, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def _interrupt(signum: int, frame: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
