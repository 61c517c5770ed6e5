"""`shoal download` from a hub on the loopback. It runs as a process, since the hub library reads its settings once."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal import env
from shoal.launch.hub import BUNDLED
from support.hub import FakeHub, serving

pytestmark = pytest.mark.slow  # starts processes

MODEL = "org/demo"
# Each argument is a command line.
DOWNLOAD = """
import sys
from shoal.cli.download import download
from shoal.errors import ShoalError
code = 0
for line in sys.argv[1:]:
    try:
        download.main(line.split(), standalone_mode=False)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        code = error.exit_code
sys.exit(code)
"""
LOCATE = "import sys; from shoal.launch.hub import locate; print(locate(sys.argv[1]))"


def demo() -> dict[str, bytes]:
    """The bundled model, with the other files that a repository has."""
    files = {path.name: path.read_bytes() for path in BUNDLED.iterdir()}
    beside = ["pytorch_model.bin", "original/model.safetensors", "consolidated.safetensors", "onnx/config.json"]
    return files | dict.fromkeys(beside, b"not wanted") | {"chat_template.jinja": b"{{ messages }}"}


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    files = demo()
    pickled = {"config.json": b"{}", "pytorch_model.bin": b"weights", "vocab.json": b"{}", "merges.txt": b""}
    models = {MODEL: files, "org/pickled": pickled, "org/none": {"config.json": b"{}"}, "org/gated": files}
    with serving(FakeHub(models, gated={"org/gated"})) as hub:
        yield hub


def run(hub: FakeHub, home: Path, script: str, *arguments: str, offline: bool = False) -> tuple[int, str, str]:
    """Run a script. Return exit code, stdout, and the lines of stderr that do not show progress."""
    settings = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    settings |= {"HF_HUB_OFFLINE": "1" if offline else "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": ""}
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        env=env.child_environment(settings),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout.strip(), done.stderr


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != ".cache"}


def test_a_downloaded_model_is_found_offline(hub: FakeHub, tmp_path: Path) -> None:
    code, folder, log = run(hub, tmp_path, DOWNLOAD, MODEL)
    assert code == 0, log
    wanted = {path.name for path in BUNDLED.iterdir() if path.suffix != ".md"} | {"chat_template.jinja"}
    assert names(Path(folder)) == wanted
    assert (Path(folder) / "model.safetensors").read_bytes() == (BUNDLED / "model.safetensors").read_bytes()
    hub.fetched.clear()
    assert run(hub, tmp_path, LOCATE, MODEL, offline=True)[:2] == (0, folder)
    assert run(hub, tmp_path, DOWNLOAD, MODEL)[:2] == (0, folder)
    assert hub.fetched == [], "files that were there were fetched again"


def test_a_directory_gets_plain_files(hub: FakeHub, tmp_path: Path) -> None:
    target = tmp_path / "a" / "model"
    code, folder, log = run(hub, tmp_path / "home", DOWNLOAD, f"{MODEL} --dir {target}")
    assert (code, folder) == (0, str(target)), log
    assert not any(path.is_symlink() for path in target.iterdir())
    assert (target / "model.safetensors").read_bytes() == (BUNDLED / "model.safetensors").read_bytes()
    hub.fetched.clear()
    assert run(hub, tmp_path / "home", DOWNLOAD, f"{MODEL} --dir {target}")[0] == 0
    assert hub.fetched == []


def test_pickled_weights_are_fetched_only_without_safetensors(hub: FakeHub, tmp_path: Path) -> None:
    code, folder, log = run(hub, tmp_path, DOWNLOAD, "org/pickled")
    assert code == 0, log
    assert names(Path(folder)) == {"config.json", "pytorch_model.bin", "vocab.json", "merges.txt"}
    assert run(hub, tmp_path, LOCATE, "org/pickled", offline=True)[:2] == (0, folder)


@pytest.mark.parametrize("broken", ["tokenizer.json", "model.safetensors"])
def test_an_interrupted_download_is_not_taken_as_complete(hub: FakeHub, tmp_path: Path, broken: str) -> None:
    hub.broken.add(broken)
    code, _, log = run(hub, tmp_path, DOWNLOAD, MODEL)
    assert code == 2
    assert not list(tmp_path.rglob("snapshots/*/model.safetensors")), "weights come last"
    code, _, log = run(hub, tmp_path, LOCATE, MODEL, offline=True)
    assert code == 1
    assert "CheckpointError" in log
    assert "shoal download org/demo" in log
    hub.broken.clear()
    code, folder, log = run(hub, tmp_path, DOWNLOAD, MODEL)
    assert code == 0, log
    assert {"tokenizer.json", "model.safetensors"} <= names(Path(folder))


def test_refusals_are_one_line(hub: FakeHub, tmp_path: Path) -> None:
    refusals = {
        "org/unknown": "error: the hub has no model org/unknown, or it is private",
        "org/gated": "error: org/gated is gated: accept its terms",
        "org/none": "error: org/none has no weights that can be loaded",
        f"{MODEL} --revision v9": "error: org/demo has no revision v9",
        "./demo": "error: ./demo is not an id on the hub",
        "shape:qwen3-0.6b": "error: shape:qwen3-0.6b is not an id on the hub",
        "not+an+id": "error: not+an+id is neither a folder nor an id",
        f"{MODEL} --dir /proc/nowhere": "error: --dir /proc/nowhere cannot be written",
        f"{MODEL} --dir {BUNDLED}": "has files that no download made",
        f"{MODEL} --dir {BUNDLED / 'config.json'}": "config.json cannot be written",
    }
    code, out, log = run(hub, tmp_path, DOWNLOAD, *refusals)
    assert (code, out) == (2, "")
    lines = [line for line in log.splitlines() if line.startswith("error")]
    assert len(lines) == len(refusals) == len([line for line in log.splitlines() if "Warning" not in line]), log
    for line, expected in zip(lines, refusals.values(), strict=True):
        assert expected in line


def test_a_model_larger_than_the_disk_is_refused_before_anything_is_fetched(hub: FakeHub, tmp_path: Path) -> None:
    hub.sizes["model.safetensors"] = 2**60
    code, _, log = run(hub, tmp_path, DOWNLOAD, MODEL)
    assert code == 2
    assert "org/demo needs 1073741824.00 GiB" in log
    assert hub.fetched == []


def test_an_unknown_model_offline_is_refused(hub: FakeHub, tmp_path: Path) -> None:
    code, _, log = run(hub, tmp_path, DOWNLOAD, MODEL, offline=True)
    assert code == 2
    assert "HF_HUB_OFFLINE is set" in log
