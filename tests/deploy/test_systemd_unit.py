"""The systemd unit: systemd reads it without a complaint, and it agrees with what `shoal serve` does."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from shoal.errors import UserError
from support.serve_flags import unknown_flags

UNIT = Path(__file__).parent.parent.parent / "deploy" / "systemd" / "shoal.service"


@pytest.fixture
def service() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None, strict=True)
    parser.optionxform = str  # type: ignore[assignment]  # names have capital letters
    parser.read_string(UNIT.read_text())
    return parser["Service"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_reads_the_unit_without_a_complaint(tmp_path: Path) -> None:
    program = tmp_path / "shoal"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    (tmp_path / UNIT.name).write_text(UNIT.read_text().replace("/opt/shoal/bin/shoal", str(program)))
    command = ["systemd-analyze", "verify", "--man=no", str(tmp_path / UNIT.name)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_the_command_has_flags_of_serve(service: configparser.SectionProxy) -> None:
    words = service["ExecStart"].split()
    assert words[:2] == ["/opt/shoal/bin/shoal", "serve"]
    assert unknown_flags(words[2:]) == set()


def test_the_example_of_flags_has_flags_of_serve() -> None:
    flags = yaml.safe_load((UNIT.parent / "serve.yaml").read_text())
    assert unknown_flags(f"--{name}" for name in flags if name != "model") == set()


def test_systemd_waits_longer_than_a_drain(service: configparser.SectionProxy) -> None:
    drain = re.search(r"--shutdown-timeout (\d+)", service["ExecStart"])
    assert drain is not None
    assert int(service["TimeoutStopSec"]) >= int(drain[1]) + 15, "clients and processes need time after the drain"
    assert service["KillMode"] == "mixed", "ranks get no SIGTERM of their own while requests are drained"


def test_a_mistake_of_the_user_is_not_tried_again(service: configparser.SectionProxy) -> None:
    assert service["Restart"] == "on-failure"
    assert int(service["RestartPreventExitStatus"]) == UserError.exit_code


def test_gpus_shared_memory_and_memory_limits_stay_visible(service: configparser.SectionProxy) -> None:
    hidden = {"PrivateDevices", "PrivateIPC", "DeviceAllow", "DevicePolicy", "ProcSubset", "MemoryDenyWriteExecute"}
    assert hidden.isdisjoint(service)
