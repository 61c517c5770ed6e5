"""From what a user calls a model to a folder on this host."""

from pathlib import Path

from shoal import env
from shoal.errors import CheckpointError
from shoal.lazy import load

_PACKAGE = Path(__file__).parent.parent
BUNDLED = _PACKAGE / "demo_model"
_SHAPES = _PACKAGE / "shapes"
_CONFIGURATION = ["*.json", "*.jinja", "tokenizer.model"]
_WEIGHTS = ["*.safetensors"]


def locate(model: str | None, revision: str | None = None, *, weights: bool = True) -> Path:
    """None: the bundled model. `shape:NAME`: a configuration without weights. A folder. Else an id on the hub.

    Raises:
        CheckpointError: there is no such model, or it can't be fetched.
    """
    if model is None:
        return BUNDLED
    if model.startswith("shape:"):
        return _shape(model.removeprefix("shape:"), weights=weights)
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists() or model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise CheckpointError(
            f"{model} is not a folder; a model is a folder in Hugging Face's format or an id on the hub"
        )
    return _fetch(model, revision, weights=weights)


def is_shape(model: str | None) -> bool:
    return model is not None and model.startswith("shape:")


def _shape(name: str, *, weights: bool) -> Path:
    known = sorted(path.name for path in _SHAPES.iterdir() if path.is_dir())
    if name not in known:
        raise CheckpointError(f"there is no shape {name!r}; known are {', '.join(known)}")
    if weights:
        raise CheckpointError(f"shape:{name} has no weights; add --load-format dummy")
    return _SHAPES / name


def _fetch(model: str, revision: str | None, *, weights: bool) -> Path:
    download = load("huggingface_hub:snapshot_download")
    hub_error: type[Exception] = load("huggingface_hub.errors:HfHubHTTPError")
    patterns = _CONFIGURATION + (_WEIGHTS if weights else [])
    try:
        return Path(download(model, revision=revision, allow_patterns=patterns))
    except hub_error as error:
        raise CheckpointError(
            f"{model}: the hub refused: {_first_line(error)}. Is the name right, and HF_TOKEN set?"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        how = (
            "HF_HUB_OFFLINE is set and it is not in the cache"
            if env.hub_offline()
            else "no folder, and the hub can't be reached"
        )
        raise CheckpointError(
            f"{model}: {how} ({_first_line(error)}). Give a local folder, or download it where there is a network"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
