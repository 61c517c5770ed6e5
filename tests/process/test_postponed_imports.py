"""Tests of modules that are loaded at their first use."""

import subprocess
import sys
from pathlib import Path

import pytest

MODULE = """
import shelf.book
from shelf.book import pages
loads.append(__name__)
title = "a title"
"""
PROGRAM = """
import builtins, sys
builtins.loads = loads = []
from shoal.process.postponed_imports import load_now, postpone
postpone(["shelf.late", "shelf.absent"])
import shelf
late = shelf.late
assert loads == ["shelf.book", "shelf"]
assert (late.__name__, late.__package__) == ("shelf.late", "shelf")
assert not hasattr(late, "__path__") and not hasattr(late, "__wrapped__")
assert loads == ["shelf.book", "shelf"], "looking at what each module has does not load it"
"""
USES = {
    "attribute": "assert late.title == 'a title'",
    "from": "from shelf.late import title; assert title == 'a title'",
    "star": "from shelf.late import *; assert title == 'a title'",
    "load": "load_now('shelf.late'); load_now('shelf.late'); assert vars(late)['title'] == 'a title'",
    "other": "import shelf.other; assert shelf.other.title == 'a title'",
    "missing": "assert not hasattr(late, 'author')",
}
END = """
assert loads == ["shelf.book", "shelf", "shelf.late"], loads
load_now("shelf.book"), load_now("nowhere")
assert loads == ["shelf.book", "shelf", "shelf.late"], loads
try:
    import shelf.absent
except ModuleNotFoundError as error:
    assert error.name == "shelf.absent"
else:
    raise AssertionError("it was found")
"""


@pytest.mark.slow
@pytest.mark.parametrize("use", USES)
def test_a_module_is_loaded_at_its_first_use(tmp_path: Path, use: str) -> None:
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    (shelf / "__init__.py").write_text("from shelf import late, book\nloads.append(__name__)\n")
    (shelf / "book.py").write_text("loads.append(__name__)\npages = 3\n")
    (shelf / "late.py").write_text(MODULE)
    (shelf / "other.py").write_text("import sys\ntitle = vars(sys.modules['shelf.late']).get('title')\n")
    subprocess.run([sys.executable, "-c", f"{PROGRAM}\n{USES[use]}\n{END}"], check=True, cwd=tmp_path)


@pytest.mark.slow
def test_the_compiler_of_torch_can_be_loaded_later() -> None:
    """It can only be loaded after the parts that were postponed."""
    program = "from shoal.process import postponed_imports\npostponed_imports.postpone_parts_of_torch()\n"
    subprocess.run([sys.executable, "-c", program + "import torch, torch._dynamo"], check=True)


@pytest.mark.slow
def test_an_engine_loads_neither_these_parts_nor_the_compiler() -> None:
    program = """
import sys
from shoal.process import postponed_imports
postponed_imports.postpone_parts_of_torch()
from shoal import LLM, SamplingParams
with LLM(max_model_len=64, kv_cache_memory_bytes="2MiB") as llm:
    llm.generate("1 + 2 =", SamplingParams(max_tokens=8), use_tqdm=False)
assert "torch" in sys.modules
assert not {"torch._prims", "torch._dynamo"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.slow
def test_parts_of_torch_are_loaded_for_tensors_without_numbers() -> None:
    program = """
from shoal.process import postponed_imports
postponed_imports.postpone_parts_of_torch()
import torch
def functions():
    return len(torch._C._dispatch_get_registrations_for_dispatch_key("Meta"))
before = functions()
postponed_imports.load_now(postponed_imports.META_FUNCTIONS)
assert functions() > before, "they were there already: there is nothing to postpone any more"
"""
    subprocess.run([sys.executable, "-c", program], check=True)
