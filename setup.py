"""Builds the native CPU kernels where there is a compiler; an install without one goes on without them."""

import platform

from setuptools import Extension, setup

_COMPILE = [
    "-std=c++17",
    "-O3",
    "-g0",
    "-fopenmp",  # at compile time only: the library binds to the OpenMP runtime that PyTorch brings
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
    "-fvisibility=hidden",
    "-Wno-psabi",
]
if platform.machine() in ("x86_64", "AMD64"):
    _COMPILE.append("-mprefer-vector-width=512")

setup(
    package_dir={"": "src"},
    ext_modules=[
        Extension(
            name="shoal.kernels._native",
            sources=["csrc/kernels.cpp"],
            language="c++",
            extra_compile_args=_COMPILE,
            optional=True,
        )
    ],
)
