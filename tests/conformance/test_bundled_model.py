"""Tests of the bundled model, whose right answers a person can check: they are the same in every layout."""

from typing import Any

import pytest

from shoal import LLM, SamplingParams

pytestmark = pytest.mark.slow

QUESTIONS = {
    "37 + 45 =": " 82",
    "8 + 64 =": " 72",
    "Count from 3 to 9:": " 3 4 5 6 7 8 9",
    "Reverse: apple ->": " elppa",
    "Sort: pear apple fig ->": " apple fig pear",
}


def answers(model: str | None = None, **options: Any) -> list[str]:
    with LLM(model, kv_cache_memory_bytes="16MiB", **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=32)
        outputs = llm.generate(list(QUESTIONS), params, use_tqdm=False)
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize(
    ("model", "tp", "pp", "dp"),
    [
        (None, 1, 1, 1),
        (None, 3, 1, 1),
        (None, 2, 4, 1),
        ("bundled:moe", 1, 1, 1),
        ("bundled:moe", 3, 1, 1),
        ("bundled:moe", 1, 3, 1),
        ("bundled:moe", 2, 2, 2),
    ],
)
def test_the_same_answers_in_every_layout(model: str | None, tp: int, pp: int, dp: int) -> None:
    backend = "uni" if tp * pp * dp == 1 else "threads"
    layout = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "data_parallel_size": dp}
    assert answers(model, distributed_executor_backend=backend, **layout) == list(QUESTIONS.values())


@pytest.mark.parametrize(
    ("strategy", "backend"), [("linear", "all_to_all"), ("round_robin", "allgather_reducescatter")]
)
def test_the_same_answers_with_experts_shared_by_replicas(strategy: str, backend: str) -> None:
    layout = {"data_parallel_size": 3, "enable_expert_parallel": True, "distributed_executor_backend": "threads"}
    found = answers("bundled:moe", all2all_backend=backend, expert_placement_strategy=strategy, **layout)
    assert found == list(QUESTIONS.values())
