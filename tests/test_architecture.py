"""Tests that the code keeps the rules of import of docs/architecture.md.

Edges come from the syntax trees, function-local imports included, and from the arguments of `load("module:Name")`.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

# Every package may import these. None of them imports a package that is not in this list.
COMMON = {
    "activity", "addresses", "config", "env", "errors", "git_lfs", "lazy", "log", "native_call", "native_library",
    "outputs", "parameter_forms", "params", "process", "sampling_table", "values", "shoal",
}  # fmt: skip

# package -> the other packages of Shoal that it may import: those below it
ALLOWED = {
    "__main__": {"cli"},
    "cli": {"server", "client", "jobs", "bench", "doctor", "llm", "launch", "text", "wire"},
    "server": {"llm", "openai", "launch", "text", "structured", "cluster", "transport", "protocols", "wire"},
    "client": set(),
    "jobs": {"openai", "text"},
    "openai": {"text", "structured"},
    "bench": {"launch", "engine", "planner", "devices", "worker", "transport", "protocols", "wire"},
    "doctor": {"launch", "planner", "devices", "worker", "transport", "wire"},
    "llm": {"launch", "cluster", "engine", "planner", "text", "trace", "transport", "protocols", "wire"},
    "launch": {
        "cluster",
        "engine",
        "executors",
        "planner",
        "models",
        "devices",
        "text",
        "trace",
        "transport",
        "protocols",
        "wire",
    },
    "launch.torchrun": {"devices", "comm"},
    "text": {"structured", "transport", "wire"},
    "structured": {"transport", "wire"},
    "planner": {"models", "parallel", "devices", "wire"},
    "cluster": {"trace", "transport", "protocols", "wire"},
    "engine": {"executors", "planner", "devices", "text", "trace", "transport", "protocols", "wire"},
    "executors": {"transport", "protocols", "wire", "devices"},
    "executors.inprocess": {"transport", "protocols", "wire", "devices", "worker", "comm"},
    "executors.threads": {"transport", "protocols", "wire", "devices", "worker", "comm"},
    "executors.fork_server": {"transport", "protocols", "wire", "process", "worker"},
    "worker": {"models", "parallel", "comm", "kernels", "devices", "trace", "transport", "wire"},
    "models": {"parallel", "kernels", "transport", "wire"},
    "parallel": {"comm", "kernels"},
    "distributed": {"comm"},
    "comm": set(),
    "kernels": set(),
    "devices": set(),
    "trace": {"wire"},
    "transport": {"wire"},
    "protocols": {"wire"},
    "wire": {"devices"},
}

# These modules do not import torch, even indirectly. Code that needs torch is imported with `load` in a rank's process.
TORCH_FREE = [
    "shoal", "shoal.params", "shoal.parameter_forms", "shoal.sampling_table",
    "shoal.outputs", "shoal.values", "shoal.errors", "shoal.config", "shoal.env", "shoal.wire",
    "shoal.protocols", "shoal.activity", "shoal.process", "shoal.log", "shoal.devices", "shoal.transport",
    "shoal.trace",
    "shoal.engine", "shoal.planner", "shoal.cluster", "shoal.launch", "shoal.llm", "shoal.text", "shoal.jobs",
    "shoal.openai", "shoal.bench", "shoal.doctor", "shoal.structured", "shoal.server", "shoal.client", "shoal.cli",
    "shoal.executors.base", "shoal.executors.table", "shoal.executors.multiprocess", "shoal.executors.node_agent",
    "shoal.worker.__main__",
    "shoal.models.spec", "shoal.models.manifest", "shoal.models.kv_format", "shoal.models.registry",
    "shoal.models.families", "shoal.models.config_json", "shoal.models.implementation", "shoal.models.model_folder",
    "shoal.kernels.weight_format",
    "shoal.models.checkpoint.checkpoint", "shoal.models.checkpoint.stored_file", "shoal.models.checkpoint.pickled",
    "shoal.models.transformers.fallback_spec",
    "shoal.models.transformers.read_spec", "shoal.parallel.topology", "shoal.parallel.partition",
    "shoal.parallel.stages", "shoal.parallel.expert_placement", "shoal.parallel.all2all.choice",
]  # fmt: skip

# The modules that `load` may import, besides those that the table above allows.
LOADABLE = {
    "shoal.llm.llm": {"shoal"},
    "shoal.llm.async_llm": {"shoal"},
    "shoal.llm.data_parallel": {"shoal"},
    "shoal.params": {"shoal"},
    "shoal.outputs": {"shoal"},
    "shoal.errors": {"shoal"},
    "shoal.cli.commands": {"cli"},
    "shoal.cli.generate": {"cli"},
    "shoal.cli.serve": {"cli"},
    "shoal.cli.plan": {"cli"},
    "shoal.cli.doctor": {"cli"},
    "shoal.cli.bench": {"cli"},
    "shoal.cli.top": {"cli"},
    "shoal.cli.scale": {"cli"},
    "shoal.cli.download": {"cli"},
    "shoal.cli.cluster_keys": {"cli"},
    "shoal.cli.completion": {"cli"},
    "shoal.cli.certificates": {"cli"},
    "shoal.client.top": {"cli"},
    "shoal.client.scale": {"cli"},
    "shoal.client.load.load_test": {"cli"},
    "shoal.comm.torch_job": {"launch"},
    "shoal.executors.inprocess": {"executors"},
    "shoal.executors.threads": {"executors"},
    "shoal.executors.multiprocess": {"executors"},
    "shoal.structured.host": {"text"},
    "shoal.structured.matcher": {"text"},
    "shoal.models.transformers.trial": {"models"},
    "shoal.models.checkpoint.torch_files": {"models"},
    "shoal.launch.ray.ray_nodes": {"launch"},
    "ray": {"launch"},
    "ray.util": {"launch"},
    "ray.util.metrics": {"launch"},
    "ray.util.placement_group": {"launch"},
    "ray.util.scheduling_strategies": {"launch"},
    "ray._private.state": {"launch"},
    "ray._private.worker": {"launch"},
    "huggingface_hub": {"launch"},
    "huggingface_hub.constants": {"launch"},
    "transformers": {"text", "models"},
    "transformers.conversion_mapping": {"models"},
    "yaml": {"cli"},
    "matplotlib.figure": {"client"},
}

# The prefixes of names of metrics, which look like `module:Name`.
METRICS = {"vllm", "shoal"}

# The packages that may import a library.
CONFINED = {
    "cryptography": {"cli"},
    "click": {"cli", "worker", "engine", "text"},
    "tqdm": {"cli", "launch", "llm"},
    "tokenizers": {"text"},
    "jinja2": {"text"},
    "llguidance": {"structured", "text"},
    "msgspec": {"wire"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "pydantic": {"server"},
    "uvicorn": {"server"},
    "uvloop": {"server"},
    "httptools": {"server"},
    "prometheus_client": {"server"},
    "aiohttp": {"client"},
    "rich": {"cli", "client", "doctor"},
    "matplotlib": {"client"},
    "torch": {"distributed", "comm", "parallel", "kernels", "models", "worker"},
    "numpy": {"worker", "kernels", "cluster"},
    "huggingface_hub": set[str](),
    "ray": set[str](),
    "transformers": set[str](),
}


@cache
def modules() -> dict[str, ast.Module]:
    """Return the syntax tree of each module, by its dotted name."""
    found = {}
    for path in sorted((SOURCE / "shoal").rglob("*.py")):
        name = ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = ast.parse(path.read_text("utf-8"))
    return found


def imports(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def loads(tree: ast.Module) -> Iterator[str]:
    """Return the modules that are named in `load(...)` and in tables of `module:Name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, colon, name = node.value.partition(":")
            if module in METRICS:
                continue
            if colon and name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
                yield module


def package(name: str) -> str:
    """Return the package of a module: `shoal.engine.core` -> `engine`; the root package is `shoal`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "shoal"


@cache
def uses() -> dict[str, set[str]]:
    """Return, for each module, the modules that it imports, loads or names in a string to start a process."""
    found: dict[str, set[str]] = {}
    for name, tree in modules().items():
        targets = {target if target in modules() else target.rpartition(".")[0] for target in imports(tree)}
        texts = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
        targets |= {text.partition(":")[0] for text in texts if isinstance(text, str)}
        found[name] = targets & modules().keys() - {name, "shoal"}
    del found["shoal"]  # it loads the modules that its callers name
    return found


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Return the cycles of a graph, found by removing nodes without outgoing or incoming edges until none is left."""
    left = {name: set(targets) for name, targets in edges.items()}
    while True:
        reached = {target for targets in left.values() for target in targets}
        ends = {name for name, targets in left.items() if not targets & left.keys() or name not in reached}
        if not ends:
            return [sorted(left)] if left else []
        left = {name: targets - ends for name, targets in left.items() if name not in ends}


def allowed(name: str) -> set[str]:
    inner = name.removeprefix("shoal.")
    return COMMON | {package(name)} | ALLOWED.get(inner, ALLOWED.get(package(name), set()))


@pytest.mark.parametrize("name", modules())
def test_imports_run_one_way(name: str) -> None:
    for target in uses().get(name, ()):
        assert package(target) in allowed(name), f"{name} uses {target}"


def test_modules_have_no_import_cycle() -> None:
    assert cycles(uses()) == []


def test_packages_have_no_import_cycle() -> None:
    """Packages of any depth count. A package and its own modules are one node, without its sub-packages."""
    for parent in {name.rpartition(".")[0] for name in modules()} - {""}:
        edges: dict[str, set[str]] = {}
        for name, targets in uses().items():
            room = _room(name, parent)
            if room:
                edges.setdefault(room, set()).update({_room(each, parent) for each in targets} - {room, ""})
        assert cycles(edges) == [], parent


def _room(name: str, parent: str) -> str:
    """Return the sub-package of `parent` that contains a module, or ""."""
    inner = name.removeprefix(f"{parent}.")
    first, dot, _ = inner.partition(".")
    return f"{parent}.{first}" if inner != name and dot else ""


def test_cycles_are_found() -> None:
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert cycles({"a": {"b"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("name", modules())
def test_libraries_are_imported_only_in_their_packages(name: str) -> None:
    for target in imports(modules()[name]):
        home = CONFINED.get(target.split(".")[0])
        assert home is None or package(name) in home, f"{name} imports {target}"


def test_load_imports_only_listed_modules() -> None:
    for name, tree in modules().items():
        for target in loads(tree):
            assert target in LOADABLE, f"{name} loads {target}"
            assert package(name) in LOADABLE[target], f"{name} loads {target}"


def test_every_package_is_in_the_table() -> None:
    assert {package(name) for name in modules()} <= set(ALLOWED) | COMMON


def test_one_module_reads_the_environment() -> None:
    for name, tree in modules().items():
        for node in ast.walk(tree):
            reads = isinstance(node, ast.Attribute) and node.attr in {"environ", "getenv", "putenv"}
            assert not reads or name == "shoal.env", f"{name} touches the environment"


def test_packages_have_empty_inits() -> None:
    for path in (SOURCE / "shoal").glob("*/**/__init__.py"):
        assert path.read_text() == "", path


@pytest.mark.slow
def test_torch_free_modules_do_not_load_torch() -> None:
    names = [
        name
        for name in modules()
        if any(name == free or name.startswith(f"{free}.") for free in TORCH_FREE if free != "shoal")
    ] + ["shoal"]
    assert len(names) > 40
    script = (
        "import importlib, sys\n"
        f"for name in {sorted(names)!r}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} loads torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_document_names_every_package() -> None:
    text = (SOURCE.parent / "docs" / "architecture.md").read_text("utf-8")
    for name in {package(name) for name in modules()} - {"shoal"}:
        assert f"`{name}" in text, f"docs/architecture.md does not speak of {name}"


def test_every_module_that_the_document_names_exists() -> None:
    text = (SOURCE.parent / "docs" / "architecture.md").read_text("utf-8")
    packages = "|".join({package(name) for name in modules()})
    names = [name.split(".") for name in re.findall(rf"`((?:{packages})(?:\.\w+)+)[`(]", text)]
    assert len(names) > 60
    assert [".".join(parts) for parts in names if parts[-1] not in ("py", "json") and not is_in_the_code(parts)] == []


def is_in_the_code(parts: list[str]) -> bool:
    """Return whether these are the names of a module and, after it, of what is in it: `cluster.fleet.Fleet`."""
    for length in range(len(parts), 0, -1):
        tree = modules().get(".".join(["shoal", *parts[:length]]))
        if tree is not None:
            text = ast.unparse(tree)
            return all(re.search(rf"\b{part}\b", text) for part in parts[length:])
    return False
