"""Tokens are the same where sums over ranks travel through sockets while the next part of a step is computed."""

import pytest

from conformance.test_greedy_tokens import Checkpoint, assert_same, generate, make_prompts


@pytest.mark.slow  # starts processes
def test_steps_with_many_rows(checkpoint: Checkpoint) -> None:
    """The prompts are one step of 406 rows, which the row-parallel layers cut into three parts."""
    folder, prompts = checkpoint("llama"), make_prompts([100, 101, 102, 103], seed=5)
    options = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "comm_backend": "gloo"}
    assert_same(folder, prompts, generate(folder, prompts, 6, **options))
