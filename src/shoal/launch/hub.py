"""The search for a model: from the name that a user gives to a folder on this host, downloaded if necessary."""

import errno
from collections.abc import Mapping
from fnmatch import fnmatchcase as fnmatch
from pathlib import Path
from shutil import disk_usage
from tempfile import NamedTemporaryFile

from shoal import env
from shoal.errors import CheckpointError, ConfigError, UserError
from shoal.lazy import load
from shoal.values import format_bytes

_PACKAGE = Path(__file__).parent.parent
BUNDLED_NAME = "bundled"  # the name of the bundled dense model for users, clients and the log
BUNDLED = _PACKAGE / "demo_model"
BUNDLED_MOE = _PACKAGE / "demo_moe_model"
_BUNDLED = {"dense": BUNDLED, "moe": BUNDLED_MOE}
_SHAPES = _PACKAGE / "shapes"
_CONFIGURATION = ["*.json", "*.jinja", "*.model", "*.tiktoken", "vocab.txt", "merges.txt"]
_WEIGHTS = ["*.safetensors", "pytorch_model*.bin"]  # the first pattern that matches is used, and no other
# Files in folders (original/, onnx/), as the * of a pattern matches / too, and the same weights in other formats.
_NEVER = ["*/*.json", "*/*.model", "*/*.safetensors", "*/*.tiktoken", "consolidated*", "pytorch_model*/*"]


def locate(model: str | None, revision: str | None = None, *, weights: bool = True) -> Path:
    """Return the absolute path of a model's folder.

    `model` is None or `bundled` (the bundled dense model), `bundled:NAME` (another bundled model), `shape:NAME` (a
    configuration without weights), a folder, or an id on the hub.

    Raises:
        CheckpointError: there is no such model, or it cannot be downloaded.
        ConfigError: no model of that name is bundled, the disk is full, or the hub's cache cannot be written.
    """
    if model is None or is_bundled(model):
        return _bundled(model)
    if model.startswith("shape:"):
        return _shape(model.removeprefix("shape:"), weights=weights)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder.absolute()
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(
            f"{model} is not a folder; a model is a folder in Hugging Face's format or an id on the hub"
        )
    return _fetch(model, revision, weights=weights).absolute()


def is_shape(model: str | None) -> bool:
    return model is not None and model.startswith("shape:")


def is_bundled(model: str | None) -> bool:
    return model is None or model == BUNDLED_NAME or model.startswith(f"{BUNDLED_NAME}:")


def _bundled(model: str | None) -> Path:
    name = "dense" if model in (None, BUNDLED_NAME) else str(model).partition(":")[2]
    if name not in _BUNDLED:
        known = ", ".join([BUNDLED_NAME, *(f"{BUNDLED_NAME}:{each}" for each in _BUNDLED)])
        raise ConfigError(f"no model {name!r} is bundled; choose one of {known}")
    return _BUNDLED[name]


def _shape(name: str, *, weights: bool) -> Path:
    known = sorted(path.name for path in _SHAPES.iterdir() if path.is_dir())
    if name not in known:
        raise CheckpointError(f"there is no shape {name!r}; choose one of {', '.join(known)}")
    if weights:
        raise CheckpointError(f"shape:{name} has no weights; add --load-format dummy")
    return _SHAPES / name


def download(model: str, revision: str | None = None, directory: Path | None = None) -> Path:
    """Download a model of the hub, into the hub's cache or as plain files into `directory`, and return its folder.

    Files that are there already are not downloaded again, and an interrupted download is resumed.

    Raises:
        CheckpointError: there is no such model, or it has no weights that can be loaded.
        ConfigError: the disk has no room for it, or `directory` cannot be written.
    """
    if is_bundled(model) or model.startswith(("shape:", ".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(f"{model} is not an id on the hub, such as Qwen/Qwen3-0.6B")
    if directory is not None:
        directory = directory.expanduser().absolute()
        _check_directory(directory)
    sizes = _list_files(model, revision)
    if not any(_is_weight(name) for name in sizes):
        raise CheckpointError(
            f"{model} has no weights that can be loaded: neither *.safetensors nor pytorch_model*.bin"
        )
    _check_free_space(model, revision, sizes, directory)
    return _fetch(model, revision, weights=True, directory=directory)


def _fetch(model: str, revision: str | None, *, weights: bool, directory: Path | None = None) -> Path:
    """Download a model, and return its folder.

    Weights come last, so a folder with all weights is complete, even if a download was interrupted before.
    """
    folder = _snapshot(model, revision, _CONFIGURATION, directory)
    for pattern in _WEIGHTS if weights else ():
        folder = _snapshot(model, revision, [pattern], directory)
        if any(_is_weight(file.name) for file in folder.glob(pattern)):
            break
    return folder


def _snapshot(model: str, revision: str | None, patterns: list[str], directory: Path | None) -> Path:
    fetch = load("huggingface_hub:snapshot_download")
    try:
        found = fetch(model, revision=revision, allow_patterns=patterns, ignore_patterns=_NEVER, local_dir=directory)
    except Exception as error:  # noqa: BLE001 - what a failing connection raises differs by the hub library's version
        raise _explained(error, model, revision) from None
    return Path(found)


def _list_files(model: str, revision: str | None) -> dict[str, int]:
    """Return the files that would be downloaded, as name -> size in bytes."""
    try:
        info = load("huggingface_hub:HfApi")().model_info(model, revision=revision, files_metadata=True)
    except Exception as error:  # noqa: BLE001 - as above
        raise _explained(error, model, revision) from None
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or []}
    kind = next((pattern for pattern in _WEIGHTS if any(_matches(name, [pattern]) for name in sizes)), _WEIGHTS[0])
    return {name: size for name, size in sizes.items() if _matches(name, [*_CONFIGURATION, kind])}


def _matches(name: str, patterns: list[str]) -> bool:
    return any(fnmatch(name, each) for each in patterns) and not any(fnmatch(name, each) for each in _NEVER)


def _is_weight(name: str) -> bool:
    return _matches(name, _WEIGHTS)


def _check_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()) and not (directory / ".cache" / "huggingface").is_dir():
            raise ConfigError(f"--dir {directory} has files that no download made; give an empty folder or a new one")
        with NamedTemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise ConfigError(f"--dir {directory} cannot be written: {error.strerror}; give another folder") from None


def _check_free_space(model: str, revision: str | None, sizes: Mapping[str, int], directory: Path | None) -> None:
    if directory is None:
        cached = load("huggingface_hub:try_to_load_from_cache")
        missing = [name for name in sizes if not isinstance(cached(model, name, revision=revision), str)]
        root = Path(load("huggingface_hub.constants:HF_HUB_CACHE"))
    else:
        missing = [name for name in sizes if not (directory / name).exists()]
        root = directory
    needed = sum(sizes[name] for name in missing)
    while not root.exists():
        root = root.parent
    free = disk_usage(root).free
    if needed > free:
        raise ConfigError(
            f"{model} needs {format_bytes(needed)}, but {root} has only {format_bytes(free)} left: free some space, or "
            "give --dir on another disk"
        )


def _explained(error: Exception, model: str, revision: str | None) -> UserError:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ConfigError(f"{model}: the disk is full; free some space and run this again, which resumes the download")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return ConfigError(f"{model}: {error.filename} cannot be written: {error.strerror}; set HF_HOME or give --dir")
    kinds = {
        kind.__name__ for kind in type(error).__mro__
    }  # compared by name, because not every version of the library has all of them
    for kind, why in _REFUSALS.items():
        if kind in kinds:
            return CheckpointError(why.format(model=model, revision=revision, error=_first_line(error)))
    if "IncompleteSnapshotError" in kinds:
        how = "its download was interrupted, and the hub cannot be reached"
    elif env.hub_offline():
        how = "it is not in the cache, and HF_HUB_OFFLINE is set"
    else:
        how = "there is no such folder, and the hub cannot be reached"
    return CheckpointError(
        f"{model}: {how} ({_first_line(error)}): give a local folder, or run `shoal download {model}` on a host with "
        "a network"
    )


_REFUSALS = {
    "GatedRepoError": "{model} is gated: accept its terms on the hub, and set HF_TOKEN",
    "RepositoryNotFoundError": "the hub has no model {model}, or it is private: check the name, and set HF_TOKEN",
    "RevisionNotFoundError": "{model} has no revision {revision}",
    "HFValidationError": "{model} is neither a folder nor an id on the hub: {error}",
    "HfHubHTTPError": "{model}: the hub refused the request: {error}",
}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
