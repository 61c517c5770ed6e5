"""The search for a model by its name. Downloads are tested in tests/cli/test_download.py."""

import errno
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import CheckpointError, ConfigError, UserError
from shoal.launch import hub


def test_names_that_need_no_network(tmp_path: Path) -> None:
    assert hub.locate(None) == hub.BUNDLED
    assert hub.locate("bundled") == hub.locate("bundled:dense") == hub.BUNDLED
    assert hub.locate("bundled:moe") == hub.BUNDLED_MOE
    assert hub.locate(str(tmp_path)) == tmp_path
    assert hub.locate("shape:llama-10m", weights=False).name == "llama-10m"


def test_names_of_bundled_models() -> None:
    with pytest.raises(
        ConfigError, match="no model 'tiny' is bundled; choose one of bundled, bundled:dense, bundled:moe"
    ):
        hub.locate("bundled:tiny")
    with pytest.raises(ConfigError, match="no model '' is bundled"):
        hub.locate("bundled:")
    for name in ("bundled", "bundled:moe"):
        with pytest.raises(CheckpointError, match=f"{name} is not an id on the hub"):
            hub.download(name)


def test_bundled_means_the_bundled_model_even_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bundled").mkdir()
    assert hub.locate("bundled") == hub.BUNDLED
    assert hub.locate("./bundled") == tmp_path / "bundled"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("shape:unknown", "there is no shape 'unknown'; choose one of"),
        ("shape:llama-10m", "shape:llama-10m has no weights; add --load-format dummy"),
        ("./nowhere", "./nowhere is not a folder"),
        ("a/b/c", "a/b/c is not a folder"),
        (__file__, "is not a folder"),
    ],
)
def test_a_name_that_is_no_model_is_refused(model: str, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        hub.locate(model)


def failing(error: Exception) -> Callable[[str], Any]:
    def fetch(*arguments: object, **options: object) -> Path:
        raise error

    return lambda path: fetch


@pytest.mark.parametrize(
    ("error", "kind", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), ConfigError, "org/name: the disk is full; free some space"),
        (
            PermissionError(errno.EACCES, "Permission denied", "/cache"),
            ConfigError,
            "org/name: /cache cannot be written: Permission denied; set HF_HOME or give --dir",
        ),
        (
            RuntimeError("connection lost.\nhint"),
            CheckpointError,
            "org/name: there is no such folder, and the hub cannot be reached",
        ),
        (ValueError(), CheckpointError, r"cannot be reached \(ValueError\): give a local folder, or run"),
    ],
)
def test_a_failed_download_gives_its_reason_in_one_line(
    error: Exception, kind: type[UserError], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "load", failing(error))
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with pytest.raises(kind, match=expected) as caught:
        hub.locate("org/name")
    assert "\n" not in str(caught.value)


def test_weights_come_last_and_pickled_ones_only_if_there_are_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def fetch(model: str, *, allow_patterns: list[str], **options: object) -> str:
        asked.append(allow_patterns)
        return str(tmp_path)

    monkeypatch.setattr(hub, "load", lambda path: fetch)
    hub.locate("org/name", weights=False)
    assert len(asked) == 1
    assert not any("safetensors" in pattern or ".bin" in pattern for pattern in asked[0])
    hub.locate("org/name")
    assert asked[2:] == [["*.safetensors"], ["pytorch_model*.bin"]]
    (tmp_path / "model-00001-of-00002.safetensors").touch()
    hub.locate("org/name")
    assert asked[-1] == ["*.safetensors"]
