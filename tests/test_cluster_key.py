"""The shared key, from the environment or from a file."""

from pathlib import Path

import pytest

from shoal import env
from shoal.errors import ConfigError
from shoal.transport.rendezvous import require_key


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("SHOAL_CLUSTER_KEY", raising=False)
    file = tmp_path / "key"
    file.touch(mode=0o600)
    monkeypatch.setenv("SHOAL_CLUSTER_KEY_FILE", str(file))
    return file


def test_a_file_has_it(key_file: Path) -> None:
    key_file.write_text("secret of the file\n")
    assert env.cluster_key() == "secret of the file"


def test_key_and_file_must_agree(key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CLUSTER_KEY", "secret")
    key_file.write_text("secret\n")
    assert env.cluster_key() == "secret"
    key_file.write_text("an older secret")
    with pytest.raises(
        ConfigError, match=r"SHOAL_CLUSTER_KEY differs from the key in SHOAL_CLUSTER_KEY_FILE=.*key: unset one"
    ):
        env.cluster_key()
    key_file.unlink()
    with pytest.raises(ConfigError, match="key can't be read"):
        env.cluster_key()


def test_an_error_without_a_key_names_both_variables() -> None:
    with pytest.raises(ConfigError, match=r"set SHOAL_CLUSTER_KEY, or the content of SHOAL_CLUSTER_KEY_FILE"):
        require_key("", "192.0.2.1")


def test_nobody_has_said_any(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SHOAL_CLUSTER_KEY", "SHOAL_CLUSTER_KEY_FILE"):
        monkeypatch.delenv(name, raising=False)
    assert env.cluster_key() == ""


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620, 0o601])
def test_a_file_that_is_open_to_others_is_refused(key_file: Path, mode: int) -> None:
    key_file.write_text("secret")
    key_file.chmod(mode)
    with pytest.raises(
        ConfigError, match=rf"may be read by users other than its owner \(mode {mode:o}\): chmod 600 it"
    ):
        env.cluster_key()


def test_a_file_that_is_no_use_is_named(key_file: Path) -> None:
    with pytest.raises(ConfigError, match="key is empty"):
        env.cluster_key()
    key_file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="key can't be read: it is no text"):
        env.cluster_key()
    key_file.unlink()
    with pytest.raises(ConfigError, match="key can't be read: No such file"):
        env.cluster_key()
