"""The grammar host of a model: how it is started, and the program (`python -m shoal.text.grammar_host ...`)."""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import click

from shoal.errors import CheckpointError, structured_outputs_error
from shoal.lazy import load
from shoal.log import configure_logging
from shoal.structured.limits import DEFAULT_LIMITS, GrammarLimits
from shoal.structured.pool import GrammarPool
from shoal.text.tokenizer import open_tokenizer
from shoal.transport.channel import Channel
from shoal.transport.process import ChildProcess, die_with_parent
from shoal.wire.base import Ids


def grammar_pool(
    folder: Path, eos: Ids, vocab_size: int, cores: Sequence[int] = (), limits: GrammarLimits = DEFAULT_LIMITS
) -> GrammarPool:
    """Return a pool of grammar processes for the model in `folder`.

    The grammar host, which reads the model's tokenizer, is started when the first grammar comes.

    Args:
        eos: ids of the model's end-of-text tokens.
        cores: the CPU cores that the host and its processes may use. The thread that starts the host may be bound to a
            core that belongs to a rank; without `cores` the host would be bound to it too.
    """

    def start(fork_fd: int) -> ChildProcess:
        arguments = ["--folder", str(folder), "--fork-fd", str(fork_fd), "--vocab-size", str(vocab_size)]
        arguments += ["--compile-cpu-s", str(limits.compile_cpu_s), "--memory-mib", str(limits.memory_mib)]
        arguments += ["--cores", ",".join(map(str, cores))]
        eos_arguments = [argument for token in eos for argument in ("--eos", str(token))]
        return ChildProcess("shoal.text.grammar_host", [*arguments, *eos_arguments], passed=[fork_fd])

    return GrammarPool(start, -(-vocab_size // 32), limits)


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option("--fork-fd", type=int, required=True)
@click.option("--vocab-size", type=int, required=True)
@click.option("--compile-cpu-s", type=int, required=True)
@click.option("--memory-mib", type=int, required=True)
@click.option("--cores", default="")
@click.option("--eos", type=int, multiple=True)
def main(
    fd: int,
    parent: int,
    folder: Path,
    fork_fd: int,
    vocab_size: int,
    compile_cpu_s: int,
    memory_mib: int,
    cores: str,
    eos: tuple[int, ...],
) -> None:
    die_with_parent(parent)
    if cores:
        with suppress(OSError):  # the cores may have been taken from this program in the meantime
            os.sched_setaffinity(0, map(int, cores.split(",")))
    # These signals may reach the whole process group. The process that started this one decides when it ends.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    configure_logging()
    limits = GrammarLimits(compile_cpu_s=compile_cpu_s, memory_mib=memory_mib)
    host = load("shoal.structured.host:GrammarHost")(Channel.from_fd(fd), socket.socket(fileno=fork_fd), limits)
    os._exit(host.run(_vocabulary(folder, eos, vocab_size)))


def _vocabulary(folder: Path, eos: Ids, vocab_size: int) -> Callable[[], object]:
    """Return a function that reads the model's tokenizer into a `structured.matcher.Vocabulary`."""

    def read() -> object:
        try:
            tokenizer = open_tokenizer(folder)
        except CheckpointError as error:
            raise structured_outputs_error(f"can't read the model's tokenizer: {error}") from None
        if tokenizer is None:
            raise structured_outputs_error("needs a tokenizer, which this model does not have")
        return load("shoal.structured.matcher:Vocabulary")(tokenizer.serialized(), eos, vocab_size)

    return read


if __name__ == "__main__":
    main()
