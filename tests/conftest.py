import logging
import os
import re
import subprocess
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest

from support import checkpoints, example_counts

SLOW_MODULE = re.compile(r"^pytestmark = (pytest\.mark\.slow|\[.*pytest\.mark\.slow\b.*\])", re.MULTILINE)
QUICK_CASES = 2  # cases of a parametrized test that a quick run has
QUICK_S = 1.0  # tests of a quick run that take more CPU time are named at its end


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return name -> folder of a small checkpoint, which is made once per session."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = checkpoints.save(name, tmp_path_factory.mktemp(name))
        return made[name]

    return get


@pytest.fixture(autouse=True)
def _log_of_a_library() -> Iterator[None]:
    """Undo the setup of the log by programs, so that each test finds the log as a library leaves it."""
    logger = logging.getLogger("shoal")
    logger.setLevel(logging.WARNING)
    yield
    logger.propagate = True
    for handler in logger.handlers[:]:
        if type(handler) is logging.StreamHandler:  # not pytest's handlers, which have other classes
            logger.removeHandler(handler)


@pytest.fixture(autouse=True)
def _gpus_only_for_gpu_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide GPUs from all other tests, so that these behave as on a host without one."""
    if "gpu" not in request.keywords:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--matrix", action="store_true", help="every combination of families, layouts and options")
    parser.addoption("--quick", action="store_true", help="a subset: no processes, and few cases of each test")


def pytest_configure(config: pytest.Config) -> None:
    example_counts.quick = config.getoption("--quick")
    # Each server with several ranks would import PyTorch once more. Tests of warm spares ask for them.
    os.environ.setdefault("SHOAL_WARM_SPARES", "0")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Spare a quick run the import of modules in which all tests are slow."""
    if example_counts.quick and collection_path.suffix == ".py":
        return True if SLOW_MODULE.search(collection_path.read_text("utf-8")) else None
    return None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Generator[None, object, object]:
    """Let a test of a quick run fail if it, or a fixture of it, starts a process."""
    if not example_counts.quick:
        return (yield)

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("this test starts a process: mark it slow", pytrace=False)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", refuse)
        return (yield)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    begun = time.process_time()
    yield
    item.user_properties.append(("cpu_s", time.process_time() - begun))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Name the tests that make a quick run slow."""
    if not example_counts.quick:
        return
    for report in terminalreporter.stats.get("passed", ()):
        seconds = dict(report.user_properties).get("cpu_s", 0.0)
        if seconds > QUICK_S:
            terminalreporter.write_line(f"{report.nodeid} took {seconds:.1f} s of CPU time: mark it slow")


def _quick_subset(items: list[pytest.Item]) -> Iterator[pytest.Item]:
    """Yield the tests of a quick run: a few cases, spread evenly, of each test that is not marked slow."""
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if "slow" not in item.keywords:
            cases.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for found in cases.values():
        count = min(len(found), QUICK_CASES)
        yield from (found[index * (len(found) - 1) // max(count - 1, 1)] for index in range(count))


# These files start first if several run at a time, since other workers would wait for long tests at the end. Files that
# start many processes take turns with files that compute: with several of the former at a time, tests would wait for
# each other's processes until they time out.
LONGEST = (
    "test_ray.py",
    "test_serving_over_hosts.py",
    "test_matrix.py",
    "test_dashboard.py",
    "test_ray_serve.py",
    "test_pipeline.py",
    "test_kills.py",
    "test_data_parallel.py",
    "test_config_fields.py",
    "test_data_parallel_by_hand.py",
    "test_rank_replacement.py",
    "test_sleep.py",
    "test_nodes.py",
    "test_async_llm.py",
    "test_properties.py",
    "test_api_servers.py",
    "test_robustness.py",
    "test_expert_parallel.py",
    "test_torchrun.py",
    "test_pickled.py",
    "test_hostile_requests.py",
    "test_command_blocks.py",
    "test_other_models.py",
    "test_parallel_use.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    import torch

    if example_counts.quick:
        chosen = set(_quick_subset(items))
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = [item for item in items if item in chosen]
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
