"""`shoal completion`: the script with which a shell completes commands and flags."""

import click
from click.shell_completion import ShellComplete, get_completion_class

from shoal.errors import EngineError

_SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(_SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print a script with which a shell completes commands and flags.

    bash: `eval "$(shoal completion bash)"` in ~/.bashrc; zsh: the same with zsh in ~/.zshrc; fish: `shoal completion
    fish > ~/.config/fish/completions/shoal.fish`.
    """
    kind = get_completion_class(shell)
    if kind is None:
        raise EngineError(f"this version of click can't complete in {shell}")
    # The `source` of click's classes may start the shell to ask for its version, but it need not be installed here.
    click.echo(ShellComplete.source(kind(ctx.find_root().command, {}, "shoal", "_SHOAL_COMPLETE")))
