"""The message of a rank that runs out of memory has its number, the sizes, and the flags that help."""

import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shoal import LLM, SamplingParams
from shoal.devices import cpu
from shoal.errors import RankFailed
from shoal.wire.ranks import RankSetup
from shoal.worker.memory_errors import explain_out_of_memory
from shoal.worker.runner import Runner
from support.plans import bare_plan, bare_rank, setup_of

GIB = 2**30
FLAGS = (
    "Lower --max-num-batched-tokens (2048), --max-num-seqs (256), --kv-cache-memory-bytes, or --max-model-len (4096)"
)


def setup(device: str = "cpu") -> RankSetup:
    sizes = {"max_model_len": 4096, "max_num_seqs": 256, "max_num_batched_tokens": 2048}
    ranks = [bare_rank(rank, device=device, device_index=1) for rank in range(4)]
    return setup_of(bare_plan(*ranks, **sizes), 3)


@pytest.fixture
def _little_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "memory", lambda: (24 * GIB, GIB))


@pytest.mark.usefixtures("_little_free_memory")
def test_an_error_of_pytorch_on_a_cpu_is_explained() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert explain_out_of_memory(caught.value, setup()) == (
        "rank 3 ran out of memory on the CPU: it asked for 4294967296.00 GiB, 1.00 GiB of 24.00 GiB were free. " + FLAGS
    )


@pytest.mark.usefixtures("_little_free_memory")
@pytest.mark.parametrize("error", [MemoryError(), MemoryError("some\nlines"), OSError(errno.ENOMEM, "no memory")])
def test_errors_of_python_and_the_kernel_are_explained(error: Exception) -> None:
    message = explain_out_of_memory(error, setup())
    assert message == f"rank 3 ran out of memory on the CPU: 1.00 GiB of 24.00 GiB were free. {FLAGS}"


def test_the_message_has_no_sizes_if_the_free_memory_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> tuple[int, int]:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(cpu, "memory", fail)
    assert explain_out_of_memory(MemoryError(), setup()) == f"rank 3 ran out of memory on the CPU. {FLAGS}"


@pytest.mark.parametrize(
    ("text", "facts"),
    [
        (
            "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 1 has a total capacity of 79.10 GiB of which 512 "
            "bytes is free. Process 7 has 3 GiB memory in use.\nSee the documentation",
            ": it asked for 20.00 MiB, 512 bytes of 79.10 GiB were free",
        ),
        ("CUDA out of memory. Tried to allocate 1.50 GiB", ": it asked for 1.50 GiB"),
        ("out of memory", ""),
    ],
)
def test_an_error_of_pytorch_on_a_gpu_is_explained(text: str, facts: str) -> None:
    line = explain_out_of_memory(torch.OutOfMemoryError(text), setup("cuda"))
    assert line is not None
    assert line.startswith(f"rank 3 ran out of memory on cuda:1{facts}. Lower")
    assert "--gpu-memory-utilization or --kv-cache-memory-bytes" in line


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("memory"), OSError(errno.ENOENT, "no file"), KeyError(1)]
)
def test_other_errors_are_not_explained(error: Exception) -> None:
    assert explain_out_of_memory(error, setup()) is None


@pytest.mark.slow
def test_the_real_error_at_a_memory_limit_is_explained() -> None:
    """The message of PyTorch's allocator has the form that `explain_out_of_memory` reads."""
    script = (
        "import resource, torch\n"
        "from worker.test_memory_errors import setup\n"
        "from shoal.worker.memory_errors import explain_out_of_memory\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))\n"
        "try:\n"
        "    torch.empty(2**30, dtype=torch.uint8)\n"
        "except RuntimeError as error:\n"
        "    print(explain_out_of_memory(error, setup()))\n"
    )
    tests = Path(__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tests, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "it asked for 1.00 GiB, " in done.stdout
    assert len(done.stdout.splitlines()) == 1


def test_an_engine_raises_the_message(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(checkpoint("llama"))
    with LLM(folder, kv_cache_memory_bytes=2**21, distributed_executor_backend="uni") as llm:
        monkeypatch.setattr(Runner, "execute", lambda *_: torch.empty(2**60))
        prompt = {"prompt_token_ids": [3, 4, 5]}
        with pytest.raises(RankFailed, match=r"rank 0 ran out of memory on the CPU: it asked for .* Lower --max-num-b"):
            llm.generate(prompt, SamplingParams(max_tokens=2), use_tqdm=False)  # type: ignore[arg-type]
