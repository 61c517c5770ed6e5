"""The bundled model: a person sees that the output is right, and it is the same in every layout."""

from typing import Any

import pytest

from shoal import LLM, SamplingParams

QUESTIONS = {
    "37 + 45 =": " 82",
    "8 + 64 =": " 72",
    "Count from 3 to 9:": " 3 4 5 6 7 8 9",
    "Reverse: apple ->": " elppa",
    "Sort: pear apple fig ->": " apple fig pear",
}


def answers(**options: Any) -> list[str]:
    with LLM(kv_cache_memory_bytes="16MiB", **options) as llm:
        params = SamplingParams(temperature=0, max_tokens=32)
        outputs = llm.generate(list(QUESTIONS), params, use_tqdm=False)
    assert {output.outputs[0].finish_reason for output in outputs} == {"stop"}
    return [output.outputs[0].text for output in outputs]


@pytest.mark.parametrize("tp", [1, 2, 3])
def test_the_same_answers_in_every_layout(tp: int) -> None:
    backend = "uni" if tp == 1 else "threads"
    assert answers(tensor_parallel_size=tp, distributed_executor_backend=backend) == list(QUESTIONS.values())


def test_by_two_processes() -> None:
    assert answers(tensor_parallel_size=2) == list(QUESTIONS.values())
