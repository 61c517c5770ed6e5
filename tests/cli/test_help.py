"""The short help, the help of groups of flags, and completion."""

import subprocess
import sys
from collections.abc import Callable

import pytest

from shoal.cli.commands import every_command
from shoal.cli.options import flag_groups

Shoal = Callable[..., int]


def test_commands_are_grouped(shoal: Shoal, capsys: pytest.CaptureFixture[str]) -> None:
    assert shoal("--help") == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) <= 30
    for name in every_command():
        assert f"\n  {name} " in out, "every command is in a section"
    assert out.index("Run models:") < out.index("generate") < out.index("Set up:") < out.index("completion")


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_a_commands_help_is_short(shoal: Shoal, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    assert shoal("generate", flag) == 0
    out = capsys.readouterr().out
    assert len(out.splitlines()) < 60
    for shown in ("--prompts-file FILE", "--resume", "--config FILE", "--help=GROUP", "sampling", "parallelism"):
        assert shown in out
    assert "--block-size INTEGER" not in out
    assert "[MODEL]\n  -p" not in out, "MODEL is not a flag"


@pytest.mark.parametrize(
    ("group", "shown"),
    [
        ("parallel", "--tensor-parallel-size"),
        ("Parallelism", "--tensor-parallel-size"),
        ("kv", "--block-size"),
        ("cache", "--block-size"),
        ("kv-cache", "--block-size"),
        ("sampling", "--logit-bias"),
        ("model", "--dtype"),
        ("sched", "--max-num-seqs"),
    ],
)
def test_a_group(shoal: Shoal, capsys: pytest.CaptureFixture[str], group: str, shown: str) -> None:
    assert shoal("generate", f"--help={group}") == 0
    out = capsys.readouterr().out
    assert shown in out
    assert "--prompts-file" not in out


def test_all_groups(shoal: Shoal, capsys: pytest.CaptureFixture[str]) -> None:
    assert shoal("generate", "--help=all") == 0
    out = capsys.readouterr().out
    command = every_command()["generate"]
    for flags in flag_groups(command).values():
        for flag in flags:
            assert flag.opts[0] in out
    assert "--prompts-file" in out


def test_unknown_group(shoal: Shoal, capsys: pytest.CaptureFixture[str]) -> None:
    assert shoal("generate", "--help=xyzzy") == 2
    out, err = capsys.readouterr()
    assert out == ""
    groups = "sampling, model, parallelism, traces, cache, scheduling, nodes, encryption, vllm, all"
    assert f"no group of flags 'xyzzy'; known are {groups}" in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("shell", "marks"), [("bash", "complete -o"), ("zsh", "#compdef shoal"), ("fish", "complete ")]
)
def test_completion_scripts(shoal: Shoal, capsys: pytest.CaptureFixture[str], shell: str, marks: str) -> None:
    assert shoal("completion", shell) == 0
    out = capsys.readouterr().out
    assert marks in out
    assert "_SHOAL_COMPLETE" in out


def test_completion_of_another_shell(shoal: Shoal, capsys: pytest.CaptureFixture[str]) -> None:
    assert shoal("completion", "csh") == 2
    assert "'csh' is not one of 'bash', 'zsh', 'fish'" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "completed"),
    [("shoal gen", "generate"), ("shoal generate --tensor-parallel-si", "--tensor-parallel-size"),
     ("shoal generate --dtype x", ""), ("shoal generate --dtype b", "bfloat16")],
)  # fmt: skip
def test_completion_completes(words: str, completed: str) -> None:
    """The script of bash calls the program to complete."""
    environment = {"_SHOAL_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split()) - 1)}
    code = "import sys; sys.argv[0] = 'shoal'; from shoal.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "".join(line.partition(",")[2] for line in done.stdout.splitlines()) == completed
