"""Builds the native CPU kernels if there is a compiler; without one the installation goes on without them."""

import platform
from dataclasses import dataclass

from setuptools import Extension, setup

_COMPILE = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp",  # at compile time only: at load time the library binds to PyTorch's OpenMP runtime
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-psabi",
]
if platform.machine() in ("x86_64", "AMD64"):
    _COMPILE.append("-mprefer-vector-width=512")


@dataclass(frozen=True)
class _Library:
    name: str  # with its package
    sources: list[str]
    headers: list[str]  # a change of these rebuilds the library; they are part of a source distribution
    flags: list[str]  # in addition to the common flags


_LIBRARIES = [
    _Library(
        "kernels._native",
        [
            *("csrc/rows.cpp", "csrc/cache_rows.cpp", "csrc/attention.cpp", "csrc/attention_tiles.cpp"),
            *("csrc/attention_avx2.cpp", "csrc/attention_avx512.cpp", "csrc/attention_bytes.cpp", "csrc/replay.cpp"),
            *("csrc/sums.cpp", "csrc/decode_batch.cpp", "csrc/routing.cpp"),
        ],
        [
            *("csrc/common.h", "csrc/chunks.h", "csrc/cache_types.h", "csrc/cache_rows.h", "csrc/attention_tiles.h"),
            *("csrc/attention_unit.h", "csrc/attention_bytes.h", "csrc/attention_few.h", "csrc/over_rows.h"),
            *("csrc/avx2.h", "csrc/avx512.h", "csrc/replay.h"),
        ],
        ["-fno-signed-zeros"],
    ),
    _Library("kernels._sampling", ["csrc/sampling.cpp"], ["csrc/common.h", "csrc/chunks.h", "csrc/top_tokens.h"], []),
    # Products are rounded before they are added, so that the results are those of PyTorch.
    _Library(
        "kernels._quantized",
        ["csrc/quantized.cpp", "csrc/int8_linear.cpp", "csrc/int4_linear.cpp", "csrc/int4_quantize.cpp"],
        [
            *("csrc/common.h", "csrc/chunks.h", "csrc/top_tokens.h", "csrc/outputs.h", "csrc/replay.h"),
            *("csrc/integer_rows.h", "csrc/int8_tiles.h", "csrc/int4_tiles.h"),
        ],
        ["-ffp-contract=off"],
    ),
    _Library(
        "kernels._bf16",
        ["csrc/bf16_linear.cpp"],
        [
            *("csrc/bf16_tiles.h", "csrc/bf16_avx2.h", "csrc/bf16_avx512.h"),
            *("csrc/avx2.h", "csrc/common.h", "csrc/chunks.h", "csrc/top_tokens.h", "csrc/outputs.h", "csrc/replay.h"),
        ],
        [],
    ),
    _Library(
        "comm._shared_memory", ["csrc/shared_memory.cpp"], ["csrc/common.h", "csrc/chunks.h", "csrc/replay.h"], []
    ),
]

setup(
    package_dir={"": "src"},
    ext_modules=[
        Extension(
            name=f"shoal.{library.name}",
            sources=library.sources,
            depends=library.headers,
            language="c++",
            extra_compile_args=[*_COMPILE, *library.flags],
            optional=True,
        )
        for library in _LIBRARIES
    ],
)
