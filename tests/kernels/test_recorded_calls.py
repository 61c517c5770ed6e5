"""Recordings of calls, and the memory of their results."""

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from shoal.kernels.base import Norm
from shoal.kernels.linear import make_linear
from shoal.kernels.native import NativeKernels, load_native
from shoal.kernels.native_calls import compute, sum_over
from shoal.kernels.recording import NotRecordable, Pool, Recorder

NATIVE, WHY = load_native()
pytestmark = pytest.mark.skipif(NATIVE is None, reason=WHY)

SIZE = 32
NORM = Norm("rms", torch.linspace(0.5, 2.0, SIZE), None, 1e-6)


def kernels() -> NativeKernels:
    assert NATIVE is not None
    return NATIVE


def inputs(seed: int) -> Tensor:
    return torch.randn((3, SIZE), generator=torch.Generator().manual_seed(seed))


def test_a_replay_computes_with_what_is_in_the_inputs_now() -> None:
    x, linear = inputs(0), make_linear(torch.randn((7, SIZE), generator=torch.Generator().manual_seed(9)), None)
    with Recorder(Pool()) as recorder:
        out = linear(kernels().norm(x, NORM))
    recording = recorder.recording()
    for seed in (1, 2):
        x.copy_(inputs(seed))
        recording.replay()
        assert torch.equal(out, linear(kernels().norm(inputs(seed), NORM)))


def test_sums_over_ranks_are_made_by_replays_only() -> None:
    """A result in other memory is copied, and the tensor that was sent is then not written to any more."""
    sent: list[Tensor] = []
    x = inputs(0)

    class Doubling:
        def all_reduce(self, tensor: Tensor) -> Tensor:
            sent.append(tensor)
            return tensor * 2

        def native_all_reduce(self, _: Tensor) -> None:
            return None

    with Recorder(Pool()) as recorder:
        out = kernels().norm(sum_over(Doubling(), kernels().norm(x, NORM)), NORM)
    assert sent == []
    recording = recorder.recording()
    recording.replay()
    once = kernels().norm(x, NORM)
    assert torch.equal(out, kernels().norm(once * 2, NORM))
    recording.replay()
    assert [torch.equal(each, once) for each in sent] == [True, True]


@pytest.mark.parametrize(
    "operation",
    [lambda x: x + 1, lambda x: torch.zeros(3, SIZE), lambda x: torch.tensor([1.0]), lambda x: x.t().contiguous()],
    ids=["sum", "new tensor", "constant", "copy"],
)
def test_other_operations_of_pytorch_are_refused(operation: object) -> None:
    assert callable(operation)
    with pytest.raises(NotRecordable, match="aten"), Recorder(Pool()):
        operation(kernels().norm(inputs(0), NORM))


def test_a_step_without_calls_is_refused() -> None:
    with Recorder(Pool()) as recorder:
        pass
    with pytest.raises(NotRecordable, match="no kernel"):
        recorder.recording()


def test_declared_operations_are_made_again() -> None:
    """They may call kernels, and take several tensors."""
    x, y = inputs(0), inputs(2)

    def operation(first: Tensor, second: Tensor) -> Tensor:
        return kernels().norm(first + second, NORM) - 1

    with Recorder(Pool()) as recorder:
        out = compute(operation, kernels().norm(x, NORM), x.shape, y)
    x.copy_(inputs(1))
    y.copy_(inputs(3))
    recording = recorder.recording()
    recording.replay()
    assert torch.equal(out, operation(kernels().norm(inputs(1), NORM), inputs(3)))
    assert recording.parts == 2


def test_memory_is_used_again_when_no_view_of_a_tensor_is_left() -> None:
    pool = Pool()
    first = pool.empty((4, 8), torch.bfloat16)
    address, view = first.data_ptr(), first.view(32)[3:]
    del first
    second = pool.empty((4, 8), torch.bfloat16)
    assert second.data_ptr() != address
    del view
    gc.collect()
    third = pool.empty((2, 8), torch.float32)  # as many bytes
    assert third.data_ptr() == address
    alias = pool.alias(third)
    del third
    gc.collect()
    assert pool.empty((4, 8), torch.bfloat16).data_ptr() == alias.data_ptr() == address


def test_steps_of_all_sizes_share_their_memory() -> None:
    """Powers of two up to the largest are less than twice the largest, and rounding up to them doubles at most."""
    pool, width, most = Pool(), 1024, 64
    norm = Norm("rms", torch.ones(width), None, 1e-6)
    recordings = []
    for rows in range(1, most + 1):
        x = torch.ones(rows, width)
        with Recorder(pool) as recorder:
            kernels().norm(kernels().norm(x, norm), norm)
        recordings.append(recorder.recording())
        recordings[-1].replay()
    largest = 2 * most * width * 4  # two results live at a time
    assert pool.nbytes <= 4 * largest + 2**21  # and what is left over in slabs


def test_the_pool_grows_with_large_tensors() -> None:
    pool = Pool()
    tensors = [pool.empty((300_000,), torch.float32) for _ in range(3)]
    tensors += [pool.empty((0, 5), torch.float32), pool.empty((1,), torch.int64)]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    assert [tensor.tolist() == [number] * tensor.numel() for number, tensor in enumerate(tensors[:3])] == [True] * 3
    assert pool.nbytes >= 3_600_000


def test_other_threads_are_not_recorded() -> None:
    x = inputs(0)
    with Recorder(Pool()) as recorder, ThreadPoolExecutor(1) as other:
        found = other.submit(lambda: kernels().norm(x, NORM) + 1).result()
    assert bool(found.isfinite().all())
    with pytest.raises(NotRecordable, match="no kernel"):
        recorder.recording()
