"""The places of tensors in files of weights from `torch.save`. Free of torch.

PyTorch's own reader for untrusted weights (`torch.load(weights_only=True)`) finds the tensors, in a child process with
limits on its time and memory. The child writes their places as JSON to a pipe; it does not send the weights themselves.
"""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from shoal import env
from shoal.errors import CheckpointError
from shoal.lazy import load
from shoal.models.checkpoint.stored_file import FileState, StoredTensor
from shoal.process import import_path
from shoal.transport.process import die_with_parent

_CPU_SECONDS = 60  # for each file; some 40,000 tensors take 10
_START_SECONDS = 300  # for loading PyTorch from a slow disk
_MEMORY_BYTES = 2 << 30  # the memory that a pickle may take in addition to its file
_MAX_ANSWER = 64 << 20  # characters for one file: about 500,000 tensors
_STDOUT, _STDERR = 1, 2
_NEW_USER, _NEW_NETWORK = 0x10000000, 0x40000000  # CLONE_NEWUSER and CLONE_NEWNET


def read_pickled(
    files: Mapping[Path, FileState], cpu_seconds: int = _CPU_SECONDS
) -> dict[Path, dict[str, StoredTensor]]:
    """Return the tensors of the state dict in each file, by name. No code from the files is run.

    One child process reads all files, since it takes about two seconds to load PyTorch. This process caches the result
    until the files change.

    Raises:
        CheckpointError: a file is truncated or malformed, asks for something that weights do not need, takes more than
            `cpu_seconds` or too much memory to read, or has no state dict.
    """
    return dict(_read(tuple(files.items()), cpu_seconds))


@lru_cache(maxsize=2)  # a model and its draft model
def _read(files: tuple[tuple[Path, FileState], ...], cpu_seconds: int) -> dict[Path, dict[str, StoredTensor]]:
    paths = [path for path, _ in files]
    # This is a plain subprocess and not a ChildProcess: its output is read to the end, and its stderr is discarded.
    command = [*import_path.python_command(__name__), str(os.getpid()), str(cpu_seconds), *map(str, paths)]
    deadline = _START_SECONDS + 2 * cpu_seconds * len(paths)
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=env.child_environment({"CUDA_VISIBLE_DEVICES": ""}),
            timeout=deadline,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        answers, ending = late.stdout or b"", f"did not end within {deadline} s"
    except OSError as error:
        raise CheckpointError(f"{paths[0]} can't be read: no process can be started: {error.strerror}") from None
    else:
        answers, ending = done.stdout, _ending(done.returncode, cpu_seconds)
    lines = answers.splitlines(keepends=True)
    found = {path: _tensors(line) for path, line in zip(paths, lines, strict=False) if line.endswith(b"\n")}
    if len(found) < len(paths):
        raise CheckpointError(
            f"{paths[len(found)]} can't be read: the process in which PyTorch read it {ending}; if you trust the file, "
            "convert it to safetensors"
        )
    return found


def _tensors(answer: bytes) -> dict[str, StoredTensor]:
    """Decode the answer about one file.

    Raises:
        CheckpointError: the child has refused the file.
    """
    decoded = json.loads(answer)
    if "refused" in decoded:
        raise CheckpointError(decoded["refused"])
    return {
        name: StoredTensor(dtype, tuple(shape), tuple(strides), offset, whole)
        for name, (dtype, shape, strides, offset, whole) in decoded["tensors"].items()
    }


def _ending(code: int, cpu_seconds: int) -> str:
    if code == -signal.SIGXCPU:
        return f"took more than {cpu_seconds} s of processor time"
    if code < 0:
        return f"was killed by {signal.Signals(-code).name}"
    return f"exited with code {code}"


def main() -> None:
    """Run the child process: its arguments are the parent's process id, the CPU seconds and the files."""
    _, parent, seconds, *files = sys.argv
    _leave_network()
    die_with_parent(int(parent))
    with os.fdopen(os.dup(_STDOUT), "w", encoding="ascii") as answers:
        os.dup2(_STDERR, _STDOUT)  # output of libraries must not mix with the answers
        list_tensors = load("shoal.models.checkpoint.torch_files:list_tensors")
        for file in map(Path, files):
            _set_limits(file, int(seconds))
            try:
                found = list_tensors(file)
                answer = json.dumps(
                    {"tensors": {name: (t.dtype, t.shape, t.strides, t.offset, t.whole) for name, t in found.items()}}
                )
                if len(answer) > _MAX_ANSWER:
                    raise CheckpointError(f"{file} can't be read: it has too many tensors ({len(found)})")
            except CheckpointError as error:
                answer = json.dumps({"refused": str(error)})
            print(answer, file=answers, flush=True)


def _leave_network() -> None:
    """Move this process to an empty network namespace, if the kernel allows it, since it needs no network.

    That takes a privilege, which every user has in a new user namespace. Root does not enter one, since it would lose
    the right to read files of other users.
    """
    libc = ctypes.CDLL(None)
    if libc.unshare(_NEW_NETWORK) and os.geteuid():
        libc.unshare(_NEW_USER | _NEW_NETWORK)


def _set_limits(file: Path, seconds: int) -> None:
    """Set the limits for the next file: memory, as address space, and CPU time.

    The size of the file is added to the memory, since it is mapped, or read whole if it has the old format.
    """
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = file.stat().st_size if file.exists() else 0
    used = resource.getrusage(resource.RUSAGE_SELF)
    _set_limit(resource.RLIMIT_AS, pages * resource.getpagesize() + size + _MEMORY_BYTES)
    _set_limit(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime) + seconds + 1)
    _set_limit(resource.RLIMIT_CORE, 0)


def _set_limit(kind: int, value: int) -> None:
    """Set the soft limit, which can be changed again, at most to the hard limit."""
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))


if __name__ == "__main__":
    main()
