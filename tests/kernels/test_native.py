"""Tests of finding, checking and loading the native library."""

import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

import pytest
import torch

from shoal.kernels import native as module
from shoal.kernels.native import NativeKernels, load_native
from shoal.kernels.reference import ReferenceKernels
from shoal.kernels.select import make_kernels

NATIVE, WHY = load_native()
needs_native = pytest.mark.skipif(NATIVE is None, reason=WHY)


_OPENMP = """
from pathlib import Path
from shoal.kernels.native import load_native
from shoal.kernels.sampling import load_native as load_sampling
assert load_native()[0] and load_sampling()[0]
mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()}
print(sum(Path(name).name.startswith(("libgomp", "libomp", "libiomp")) for name in mapped))
"""


@pytest.mark.slow
@needs_native
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_one_openmp_runtime() -> None:
    """Run in a fresh process, since libraries that other tests have loaded may bring another runtime."""
    done = subprocess.run([sys.executable, "-c", _OPENMP], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "1"


@needs_native
def test_a_stale_library_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ABI_VERSION", module.ABI_VERSION + 1)
    kernels, reason = load_native()
    assert kernels is None
    assert "stale" in reason


def test_a_missing_library_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(module, "__file__", str(tmp_path / "native.py"))
    assert load_native() == (None, "_native is not built")
    kernels, reason = make_kernels("cpu", torch.float32)
    assert isinstance(kernels, ReferenceKernels)
    assert "not built" in reason


def test_a_broken_library_is_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / f"_native{EXTENSION_SUFFIXES[0]}").write_bytes(b"not a library")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "native.py"))
    kernels, reason = load_native()
    assert kernels is None
    assert "cannot be loaded" in reason


@needs_native
def test_selection() -> None:
    assert isinstance(make_kernels("cpu", torch.bfloat16)[0], NativeKernels)
    assert isinstance(make_kernels("cpu", torch.float16)[0], ReferenceKernels)
    assert isinstance(make_kernels("cuda:1", torch.bfloat16)[0], ReferenceKernels)
