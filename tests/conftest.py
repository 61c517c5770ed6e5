import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support import checkpoints


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """name -> folder of a small checkpoint, made once a session."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = checkpoints.save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _log_of_a_library() -> Iterator[None]:
    """Each test finds the log as a library leaves it: what a program sets up for its own process is undone."""
    logger = logging.getLogger("shoal")
    logger.setLevel(logging.WARNING)
    yield
    logger.propagate = True
    for handler in logger.handlers[:]:
        if type(handler) is logging.StreamHandler:  # pytest's own, of classes of its own, come and go by themselves
            logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _gpus_only_for_gpu_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything else shows what it shows on a host without one."""
    if "gpu" not in request.keywords:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="every combination of families, layouts and options")


# Begun first, where several files run at a time: what takes long at the end has the other workers wait.
LONGEST = (
    "test_matrix.py",
    "test_serving_over_hosts.py",
    "test_kills.py",
    "test_properties.py",
    "test_sameness.py",
    "test_pipeline.py",
    "test_robustness.py",
    "test_dashboard.py",
    "test_data_parallel_by_hand.py",
    "test_async_llm.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    import torch

    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
