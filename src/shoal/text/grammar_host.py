"""The process that starts those that follow grammars: `python -m shoal.text.grammar_host --fd N --parent PID ...`."""

import os
import signal
import socket
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import click

from shoal.errors import CheckpointError, RequestError
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
    """Return a pool of grammars for a model. A process of its own reads the tokenizer when the first grammar comes.

    Args:
        folder: where the tokenizer is.
        vocab_size: of the model.
        cores: that this program may use; the thread that starts the process may be bound to one of them, which belongs
            to a rank. Empty: the process stays where it is started.
    """

    def start(door: int) -> ChildProcess:
        arguments = ["--folder", str(folder), "--door", str(door), "--vocab-size", str(vocab_size)]
        arguments += ["--compile-cpu-s", str(limits.compile_cpu_s), "--memory-mib", str(limits.memory_mib)]
        arguments += ["--cores", ",".join(map(str, cores))]
        ends = [argument for token in eos for argument in ("--eos", str(token))]
        return ChildProcess("shoal.text.grammar_host", [*arguments, *ends], passed=[door])

    return GrammarPool(start, -(-vocab_size // 32), limits)


@click.command()
@click.option("--fd", type=int, required=True)
@click.option("--parent", type=int, required=True)
@click.option("--folder", type=click.Path(path_type=Path), required=True)
@click.option("--door", type=int, required=True)
@click.option("--vocab-size", type=int, required=True)
@click.option("--compile-cpu-s", type=int, required=True)
@click.option("--memory-mib", type=int, required=True)
@click.option("--cores", default="")
@click.option("--eos", type=int, multiple=True)
def main(
    fd: int,
    parent: int,
    folder: Path,
    door: int,
    vocab_size: int,
    compile_cpu_s: int,
    memory_mib: int,
    cores: str,
    eos: tuple[int, ...],
) -> None:
    die_with_parent(parent)
    if cores:
        with suppress(OSError):  # these cores may no longer be allowed
            os.sched_setaffinity(0, map(int, cores.split(",")))
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
    ):  # they may reach the whole process group; the parent decides when this ends
        signal.signal(number, signal.SIG_IGN)
    configure_logging()
    limits = GrammarLimits(compile_cpu_s=compile_cpu_s, memory_mib=memory_mib)
    host = load("shoal.structured.host:GrammarHost")(Channel.from_fd(fd), socket.socket(fileno=door), limits)
    os._exit(host.run(_vocabulary(folder, eos, vocab_size)))


def _vocabulary(folder: Path, eos: Ids, vocab_size: int) -> Callable[[], object]:
    def read() -> object:
        try:
            tokenizer = open_tokenizer(folder)
        except CheckpointError as error:
            raise RequestError(f"structured_outputs can't read the model's tokenizer: {error}") from None
        if tokenizer is None:
            raise RequestError("structured_outputs need a tokenizer, which this model does not have")
        return load("shoal.structured.matcher:Vocabulary")(tokenizer.serialized(), eos, vocab_size)

    return read


if __name__ == "__main__":
    main()
