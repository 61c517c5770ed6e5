"""The rules of import, as docs/architecture.md states them, held against the code.

Edges come from the syntax trees, function-local imports included, and from the arguments of `load("module:Name")`.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src"

# Every package may import these.
COMMON = {
    "activity", "types", "errors", "config", "accepted", "env", "lazy", "observe", "open_files", "import_path",
    "git_lfs", "forks", "addresses", "garbage", "shoal",
}  # fmt: skip

# package -> what else of ours it may import.
ALLOWED = {
    "cli": {"server", "client", "frontend"},
    "server": {"frontend", "structured", "cluster", "transport", "protocols", "wire"},
    "client": set(),
    "frontend": {
        "cluster",
        "engine",
        "executors",
        "planner",
        "devices",
        "structured",
        "transport",
        "protocols",
        "wire",
    },
    "structured": {"transport", "wire"},
    "cluster": {"transport", "protocols", "wire"},
    "engine": {"protocols", "wire"},
    "executors": {"transport", "protocols", "wire", "devices"},
    "executors.inprocess": {"transport", "protocols", "wire", "devices", "worker", "comm"},
    "executors.threads": {"transport", "protocols", "wire", "devices", "worker", "comm"},
    "worker": {"models", "parallel", "comm", "kernels", "devices", "transport", "wire"},
    "models": {"parallel", "kernels", "transport"},
    "parallel": {"comm", "kernels"},
    "planner": {"models", "parallel", "devices", "wire"},
    "distributed": {"comm"},
    "comm": set(),
    "kernels": set(),
    "devices": set(),
    "transport": {"wire"},
    "protocols": {"wire"},
    "wire": set(),
    "observe": set(),
}

# Free of torch, transitively. `frontend` loads what is not through `load`, where a rank lives in its process.
TORCH_FREE = [
    "shoal", "shoal.types", "shoal.errors", "shoal.config", "shoal.env", "shoal.wire", "shoal.protocols",
    "shoal.accepted", "shoal.activity",
    "shoal.observe", "shoal.devices", "shoal.transport", "shoal.engine", "shoal.planner", "shoal.cluster",
    "shoal.frontend", "shoal.structured", "shoal.server", "shoal.client", "shoal.cli", "shoal.executors.base",
    "shoal.executors.multiprocess", "shoal.worker.__main__",
    "shoal.models.spec", "shoal.models.manifest", "shoal.models.checkpoint", "shoal.models.registry",
    "shoal.models.stored_file",
    "shoal.models.families", "shoal.models.fields", "shoal.models.pickled",
    "shoal.models.quantization", "shoal.models.fallback", "shoal.models.implementation", "shoal.models.opening",
    "shoal.models.overrides", "shoal.models.rope_fields", "shoal.models.text_part", "shoal.parallel.topology",
    "shoal.parallel.partition", "shoal.parallel.stages", "shoal.parallel.placement", "shoal.parallel.all2all.choose",
]  # fmt: skip

# What `load` may bring in, beside what follows from the table above.
LOADABLE = {
    "shoal.frontend.llm": {"shoal"},
    "shoal.frontend.async_llm": {"shoal"},
    "shoal.frontend.data_parallel": {"shoal"},
    "shoal.cli.commands": {"cli"},
    "shoal.client.top": {"cli"},
    "shoal.client.scale": {"cli"},
    "shoal.types": {"shoal"},
    "shoal.errors": {"shoal"},
    "shoal.executors.inprocess": {"frontend"},
    "shoal.executors.threads": {"frontend"},
    "shoal.executors.multiprocess": {"frontend"},
    "shoal.structured.host": {"frontend"},
    "shoal.structured.matcher": {"frontend"},
    "huggingface_hub": {"frontend"},
    "yaml": {"cli"},
    "huggingface_hub.constants": {"frontend"},
    "transformers": {"frontend", "models"},
    "transformers.conversion_mapping": {"models"},
    "shoal.models.torch_files": {"models"},
    "shoal.models.transformers_trial": {"models"},
    "shoal.client.load.bench": {"cli"},
    "matplotlib.figure": {"client"},
}

# What names of metrics begin with; they look like `module:Name`.
METRICS = {"vllm", "shoal"}

# Libraries that stay where they are needed.
CONFINED = {
    "click": {"cli", "worker", "frontend"},
    "tqdm": {"cli", "frontend"},
    "tokenizers": {"frontend"},
    "llguidance": {"structured", "frontend"},
    "msgspec": {"wire"},
    "fastapi": {"server"},
    "starlette": {"server"},
    "pydantic": {"server"},
    "uvicorn": {"server"},
    "uvloop": {"server"},
    "httptools": {"server"},
    "prometheus_client": set[str](),
    "aiohttp": {"client"},
    "rich": {"client"},
    "matplotlib": {"client"},
    "torch": {"distributed", "comm", "parallel", "kernels", "models", "worker"},
    "numpy": {"worker", "kernels", "cluster"},
    "huggingface_hub": set[str](),
    "transformers": set[str](),
}


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name -> syntax tree."""
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
    """Modules named in `load(...)` and in tables of `module:Name`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            module, colon, name = node.value.partition(":")
            if module in METRICS:
                continue
            if colon and name.isidentifier() and all(part.isidentifier() for part in module.split(".")):
                yield module


def package(name: str) -> str:
    """`shoal.engine.core` -> `engine`; the root package is `shoal`."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "shoal"


def allowed(name: str) -> set[str]:
    inner = name.removeprefix("shoal.")
    return COMMON | {package(name)} | ALLOWED.get(inner, ALLOWED.get(package(name), set()))


@pytest.mark.parametrize("name", modules())
def test_imports_run_one_way(name: str) -> None:
    for target in imports(modules()[name]):
        if target.startswith("shoal"):
            to = package(target)
            known = to in ALLOWED or to in COMMON
            assert not known or to in allowed(name) or name == "shoal", f"{name} imports {target}"


@pytest.mark.parametrize("name", modules())
def test_libraries_stay_where_they_are_needed(name: str) -> None:
    for target in imports(modules()[name]):
        home = CONFINED.get(target.split(".")[0])
        assert home is None or package(name) in home, f"{name} imports {target}"


def test_load_brings_in_only_what_is_listed() -> None:
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
