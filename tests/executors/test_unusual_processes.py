"""Processes that are started in unusual ways. They must work, or say what is missing."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # starts processes

SMALL = ("--max-model-len", "64", "--kv-cache-memory-bytes", "2MiB")
ASK = ("generate", "--distributed-executor-backend", "mp", "--prompt", "Once", "--max-tokens", "4", *SMALL)
ANSWER = "Once upon a time there"
# The first process of a container whose /proc shows only its processes.
CONTAINER = ("unshare", "--mount", "--pid", "--fork", "sh", "-c")
PROC = "mount -t proc -o subset=pid proc /proc && exec "


def can_make_containers() -> bool:
    try:
        done = subprocess.run([*CONTAINER, f"{PROC}true"], capture_output=True, timeout=60, check=False)
    except OSError:
        return False
    return done.returncode == 0


needs_containers = pytest.mark.skipif(not can_make_containers(), reason="needs root, and a kernel that lets it unshare")


def run(*command: str, timeout: float = 110) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def python(program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run(sys.executable, "-c", program, *arguments)


# --- streams ---------------------------------------------------------------------------------------------------------


def test_a_program_whose_standard_streams_are_closed(tmp_path: Path) -> None:
    """No socket gets the number of a standard stream, so nothing is printed into a socket."""
    output = tmp_path / "out.jsonl"
    command = (sys.executable, "-m", "shoal", *ASK, "--output", str(output))
    done = run("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command)
    assert done.returncode == 0
    assert "upon a time there" in output.read_text()


def test_an_error_does_not_go_to_stdout_if_stderr_is_closed() -> None:
    command = (sys.executable, "-m", "shoal", "generate", "./nowhere", "--prompt", "a")
    done = run("sh", "-c", 'exec "$@" 2>&-', "sh", *command)
    assert (done.returncode, done.stdout) == (2, "")


def test_sockets_never_get_the_number_of_a_standard_stream() -> None:
    program = (
        "import os, sys\n"
        "from shoal.transport.process import ChildProcess\n"
        "for fd in (0, 1, 2): os.close(fd)\n"
        "child = ChildProcess('shoal.server.api_process')\n"
        "links = {os.readlink(f'/proc/{child.pid}/fd/{fd}') for fd in (1, 2)}\n"
        "fine = links == {'/dev/null'} and child.channel.fileno() > 2\n"
        "child.kill()\n"
        "os._exit(0 if fine else 1)\n"
    )
    assert python(program).returncode == 0


# --- the ends of children --------------------------------------------------------------------------------------------

END = """
import os, signal
from shoal.transport.process import ChildProcess
child = ChildProcess("shoal.server.api_process")
os.kill(child.pid, signal.SIGKILL)
print(child.wait(60), child.exit_code, child.describe_exit(60))
child.kill()
"""


def test_a_program_that_ignores_sigchld_notices_the_end_of_a_child() -> None:
    """The child must not seem to have succeeded, although the kernel reports exit code 0."""
    told = python(f"import signal; signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n{END}").stdout
    assert (
        told
        == "True 255 ended with an unknown exit code: this process ignores SIGCHLD, or waits for all of its children\n"
    )


def test_a_program_that_waits_for_all_its_children() -> None:
    """Another part of the program, here the main thread, may learn of the end of the child first."""
    program = END.replace("SIGKILL)\n", "SIGKILL)\nos.waitpid(-1, 0)\n")
    assert python(program).stdout.startswith("True 255 ended with an unknown exit code")


def test_ignored_sigchld_is_not_inherited() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *ASK],
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
        preexec_fn=lambda: signal.signal(signal.SIGCHLD, signal.SIG_IGN),
    )
    assert (done.returncode, done.stdout.strip()) == (0, ANSWER)


# --- restricted access to /proc --------------------------------------------------------------------------------------

# As after a change of the user id, only processes with CAP_SYS_PTRACE may read the file descriptors of this one.
UNDUMPABLE = """
import ctypes, os, sys
PR_SET_DUMPABLE, PR_CAPBSET_DROP, CAP_SYS_PTRACE = 4, 24, 19
libc = ctypes.CDLL(None)
if len(sys.argv) == 1:
    libc.prctl(PR_CAPBSET_DROP, CAP_SYS_PTRACE, 0, 0, 0)  # only root has it
    os.execv(sys.executable, [*sys.orig_argv, "again"])
libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
import shoal
with shoal.LLM(distributed_executor_backend="mp", max_model_len=64, kv_cache_memory_bytes="2MiB") as llm:
    params = shoal.SamplingParams(temperature=0, max_tokens=4)
    print(llm.generate("Once", params, use_tqdm=False)[0].outputs[0].text)
"""


def test_ranks_of_a_process_that_is_not_dumpable() -> None:
    done = python(UNDUMPABLE)
    assert done.stdout.strip() == "upon a time there", done.stderr


@needs_containers
def test_the_first_process_of_a_container_with_little_of_proc() -> None:
    done = run(*CONTAINER, f'{PROC}"$@"', "sh", sys.executable, "-m", "shoal", *ASK)
    assert (done.returncode, done.stdout.strip()) == (0, ANSWER), done.stderr
    assert "/proc/meminfo does not exist" in done.stderr


# --- the first process of a container --------------------------------------------------------------------------------


def in_container(program: str) -> list[str]:
    program = (
        f"import os, signal, sys, time\nfrom shoal.cli.container_init import stand_apart\nstand_apart()\n{program}"
    )
    return [*CONTAINER, f'{PROC}"$@"', "sh", sys.executable, "-c", program]


@needs_containers
def test_only_orphans_are_reaped() -> None:
    program = (
        "from pathlib import Path\n"
        "def states():\n"
        "    stats = [each.read_text().rpartition(')')[2].split() for each in Path('/proc').glob('[0-9]*/stat')]\n"
        "    return [stat[0] for stat in stats]\n"
        "own = os.fork()\n"
        "if own == 0: os._exit(7)\n"
        "for _ in range(5):\n"
        "    middle = os.fork()\n"
        "    if middle == 0:\n"
        "        if os.fork() == 0:\n"
        "            while os.getppid() != 1: pass\n"
        "        os._exit(0)\n"
        "    os.waitpid(middle, 0)\n"
        "deadline = time.monotonic() + 60\n"
        "while len(states()) > 3 and time.monotonic() < deadline: pass\n"
        "print(len(states()), states().count('Z'), os.waitstatus_to_exitcode(os.waitpid(own, 0)[1]))\n"
    )
    done = run(*in_container(program))
    assert done.stdout.split() == ["3", "1", "7"], done.stderr  # the first process, the program, and its own child


@needs_containers
@pytest.mark.parametrize(("end", "code"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)])
def test_the_exit_code_is_that_of_the_program(end: str, code: int) -> None:
    assert run(*in_container(end)).returncode == code


@needs_containers
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_reaches_the_program_once(number: int) -> None:
    program = (
        f"signal.pthread_sigmask(signal.SIG_BLOCK, {{{number:d}}})\n"
        "print(os.getppid(), flush=True)\n"
        f"print('heard', signal.sigwait({{{number:d}}}), len(signal.sigpending()), flush=True)\n"
        "sys.exit(5)\n"
    )
    with subprocess.Popen(in_container(program), stdout=subprocess.PIPE, text=True) as outside:
        assert outside.stdout is not None
        assert outside.stdout.readline() == "1\n"
        children = Path(f"/proc/{outside.pid}/task/{outside.pid}/children").read_text().split()
        os.kill(int(children[0]), number)
        assert outside.stdout.read() == f"heard {number:d} 0\n"
        assert outside.wait(60) == 5


def test_outside_a_container_there_is_no_extra_process() -> None:
    program = (
        "import os; from shoal.cli.container_init import stand_apart\n"
        "pid = os.getpid(); stand_apart(); print(pid, os.getpid())"
    )
    before, after = python(program).stdout.split()
    assert before == after
