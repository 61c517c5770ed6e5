"""Every native library is built where there is a compiler: else PyTorch computes instead, and no other test fails."""

import shutil

import pytest

from shoal.comm.shared_memory_library import load_library
from shoal.kernels import bf16_linear, native, quantized_library, sampling


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_every_library_is_built() -> None:
    found = {
        "_native": native.load_native(),
        "_sampling": sampling.load_native(),
        "_quantized": quantized_library.load_quantized(),
        "_shared_memory": load_library(),
    }
    assert {name: why for name, (library, why) in found.items() if library is None} == {}
    library, why = bf16_linear.load_bf16()
    assert library is not None or why == bf16_linear.NO_INSTRUCTIONS
