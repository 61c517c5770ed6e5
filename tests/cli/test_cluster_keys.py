"""`shoal cluster-keys`: the files, their modes, and what it says."""

import re
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.transport import tls
from support.certificates import files_in

Shoal = Callable[..., int]


def modes(folder: Path) -> dict[str, int]:
    return {str(each.relative_to(folder)): stat.S_IMODE(each.stat().st_mode) for each in sorted(folder.rglob("*"))}


def test_one_certificate_for_all_hosts(shoal: Shoal, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "new" / "keys"
    assert shoal("cluster-keys", str(folder)) == 0
    assert modes(folder) == {"ca-key.pem": 0o600, "ca.pem": 0o644, "cert.pem": 0o644, "key.pem": 0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert 364 < tls.check_files(files_in(folder)).days_left <= 365
    out = capsys.readouterr().out
    assert f"Copy ca.pem, cert.pem and key.pem of {folder}" in out
    assert "Give --cluster-tls" in out
    assert f"Keep {folder}/ca-key.pem off the hosts" in out


def test_nothing_is_overwritten(shoal: Shoal, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key.pem").write_text("precious")
    assert shoal("cluster-keys", str(tmp_path)) == 2
    assert "has key.pem already, and nothing is overwritten: give a new folder" in capsys.readouterr().err
    assert (tmp_path / "key.pem").read_text() == "precious"
    assert modes(tmp_path).keys() == {"key.pem"}


def test_a_certificate_for_each_host_and_later_ones_of_the_same_ca(shoal: Shoal, tmp_path: Path) -> None:
    first, later = tmp_path / "first", tmp_path / "later"
    assert shoal("cluster-keys", str(first), "--hosts", "2") == 0
    assert set(modes(first)) == {
        *("ca.pem", "ca-key.pem", "host-0", "host-1"),
        *(f"host-{number}/{name}.pem" for number in range(2) for name in ("ca", "cert", "key")),
    }
    assert shoal("cluster-keys", str(later), "--ca", str(first), "--days", "7") == 0
    assert modes(later).keys() == {"ca.pem", "cert.pem", "key.pem"}
    assert (later / "ca.pem").read_bytes() == (first / "ca.pem").read_bytes()
    for folder in (first / "host-0", first / "host-1", later):
        tls.check_files(files_in(folder))
    keys = {(folder / "key.pem").read_bytes() for folder in (first / "host-0", first / "host-1", later)}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ca", "{}/gone"], r"--ca .*gone has no usable ca.pem and ca-key.pem: No such file or directory"),
        (["--ca", "{}/bad"], r"--ca .*bad has no usable ca.pem and ca-key.pem: "),
        (["--days", "0"], "--days"),
        (["--hosts", "0"], "--hosts"),
    ],
)
def test_bad_input(
    shoal: Shoal, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "bad").mkdir()
    for name in ("ca.pem", "ca-key.pem"):
        (tmp_path / "bad" / name).write_text("no certificate")
    filled = [argument.format(tmp_path) for argument in arguments]
    assert shoal("cluster-keys", str(tmp_path / "new"), *filled) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(message, line)
    assert not (tmp_path / "new").exists() or not list((tmp_path / "new").iterdir())
