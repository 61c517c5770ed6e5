"""Recorded requests of lm-eval 0.4.13: it reads in the answers what `LLM` gives for the same prompts.

The requests come from the tasks in examples/lm_eval.
"""

from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import Any
from urllib.request import Request, urlopen

import msgspec
import pytest

from shoal import LLM, SamplingParams
from shoal.launch.open_model import open_model
from support.servers import ShoalServer

MEMORY = "32M"
CLOSE = 1e-4
PROMPTS = ["52 + 44 =", "Count from 3 to 9:", "Reverse: apple ->", "Sort: pear apple fig ->"]
QUESTIONS = [
    ("59 + 72 =", " 131"),
    ("59 + 72 =", " 141"),
    ("Reverse: apple ->", " \u0117\u013cppa"),
    ("12 + 30 =", " 🙂"),
]
GREEDY = [True, False, False, False]
ANSWERS = {  # parameters of the requests with PROMPTS
    "greedy": {"max_tokens": 100, "temperature": 0.0, "stop": ["\n", "<|eos|>"], "seed": 1234},
    "without eos as stop text": {"max_tokens": 100, "temperature": 0.0, "stop": ["\n"], "seed": 1234},
    "sampled": {
        "max_tokens": 24, "temperature": 1.5, "stop": ["\n", " 7", "<|eos|>"], "seed": 1234, "top_p": 0.95,
    },
}  # fmt: skip
pytestmark = [pytest.mark.timeout(400), pytest.mark.slow]


@pytest.fixture(scope="module", params=[("-tp", "2"), ("-dp", "2")], ids=" ".join)
def server(request: pytest.FixtureRequest) -> Iterator[ShoalServer]:
    with ShoalServer(*request.param, "--kv-cache-memory-bytes", MEMORY) as found:
        yield found


class Offline:
    """An `LLM` of one rank with the same model."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def answers(self, prompts: Sequence[Sequence[int]], asked: dict[str, Any]) -> list[str]:
        params = SamplingParams(**asked)
        outputs = self._llm.generate([{"prompt_token_ids": list(each)} for each in prompts], params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    def score(self, prompt: Sequence[int], context: int) -> tuple[float, bool]:
        """Return the log-likelihood of the tokens after the context, and whether each of them is the likeliest."""
        params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1)
        (output,) = self._llm.generate({"prompt_token_ids": list(prompt)}, params, use_tqdm=False)
        assert output.prompt_logprobs is not None
        places = zip(prompt[context:], output.prompt_logprobs[context:], strict=True)
        known = [each[token] for token, each in places if each is not None]
        return sum(each.logprob for each in known), all(each.rank == 1 for each in known)


@pytest.fixture(scope="module")
def offline() -> Iterator[Offline]:
    with LLM(kv_cache_memory_bytes=MEMORY, distributed_executor_backend="uni") as llm:
        yield Offline(llm)


def encode(text: str, *, bos: bool = True) -> list[int]:
    tokenizer = open_model(None, {}).tokenizer
    assert tokenizer is not None
    return tokenizer.encode(text, add_special_tokens=bos)


def ask(server: ShoalServer, body: dict[str, Any], path: str = "/v1/completions") -> list[Any]:
    """Return the choices of an answer in order. lm-eval always sends a key, here an empty one."""
    headers = {"Content-Type": "application/json", "Authorization": "Bearer "}
    request = Request(server.url + path, msgspec.json.encode({"model": "bundled"} | body), headers)
    with urlopen(request, timeout=120) as answer:
        return sorted(msgspec.json.decode(answer.read())["choices"], key=itemgetter("index"))


def score_of(choice: Any, context: int) -> tuple[float, bool]:
    """Read an answer as lm-eval does: the last token is the one that had to be generated."""
    tokens = choice["logprobs"]["token_logprobs"][context:-1]
    tops = choice["logprobs"]["top_logprobs"][context:-1]
    return sum(tokens), all(token == max(top.values()) for token, top in zip(tokens, tops, strict=True))


def scoring(prompt: Any) -> dict[str, Any]:
    return {"prompt": prompt, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}


@pytest.mark.parametrize("bos", [True, False])
def test_scores_of_a_batch_of_token_ids_are_those_of_llm(server: ShoalServer, offline: Offline, bos: bool) -> None:
    contexts = [encode(context, bos=bos) for context, _ in QUESTIONS]
    prompts = [encode(context + continuation, bos=bos) for context, continuation in QUESTIONS]
    found = [score_of(*pair) for pair in zip(ask(server, scoring(prompts)), map(len, contexts), strict=True)]
    expected = [offline.score(*pair) for pair in zip(prompts, map(len, contexts), strict=True)]
    assert [score for score, _ in found] == pytest.approx([score for score, _ in expected], rel=0, abs=CLOSE)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    if bos:
        assert [greedy for _, greedy in found] == GREEDY


def test_scores_of_a_text_are_those_of_llm(server: ShoalServer, offline: Offline) -> None:
    """With tokenized_requests=False and add_bos_token=True, the server puts the first token before the text."""
    for context, continuation in QUESTIONS:
        (choice,) = ask(server, scoring(context + continuation))
        expected = offline.score(encode(context + continuation), len(encode(context)))
        score, greedy = score_of(choice, len(encode(context)))
        assert score == pytest.approx(expected[0], rel=0, abs=CLOSE)
        assert greedy == expected[1]


def test_scores_of_the_windows_of_a_long_text_are_those_of_llm(
    server: ShoalServer, offline: Offline, request: pytest.FixtureRequest
) -> None:
    """The windows are as long as the context: one begins with the first token, the other continues the text."""
    one_rank = request.node.callspec.params["server"] == ("-dp", "2")
    tokens = encode(" ".join(f"{number} + {number} = {2 * number}" for number in range(10, 200)), bos=False)
    windows = [[0, *tokens[:1022]], tokens[1021 : 1021 + 301]]
    for window in windows:
        (choice,) = ask(server, scoring([window]))
        score, _ = score_of(choice, 1)
        assert len(choice["logprobs"]["token_logprobs"]) == len(window) + 1
        # One rank gives the same bits in any replica. The sums of two ranks have another order: then log-probabilities
        # of this model differ by 9e-6 (root mean square), independently; three deviations of their sum are allowed.
        close = CLOSE if one_rank else 3 * 9e-6 * len(window) ** 0.5
        assert score == pytest.approx(offline.score(window, 1)[0], rel=0, abs=close)


@pytest.mark.parametrize("kind", ANSWERS)
def test_outputs_for_a_batch_of_token_ids_are_those_of_llm(server: ShoalServer, offline: Offline, kind: str) -> None:
    prompts = [encode(prompt) for prompt in PROMPTS]
    found = [choice["text"] for choice in ask(server, {"prompt": prompts, **ANSWERS[kind]})]
    assert found == offline.answers(prompts, ANSWERS[kind])
    if kind != "sampled":
        assert found == [" 96", " 3 4 5 6 7 8 9", " elppa", " apple fig pear"]


def test_a_text_gets_the_right_output(server: ShoalServer) -> None:
    """lm-eval sends texts with tokenizer_backend=None."""
    body = {"max_tokens": 100, "temperature": 0.0, "stop": ["\n"], "seed": 1234}
    assert [ask(server, {"prompt": each, **body})[0]["text"] for each in PROMPTS[:2]] == [" 96", " 3 4 5 6 7 8 9"]


def test_a_chat_gets_the_right_answer(server: ShoalServer) -> None:
    messages = [{"role": "user", "content": "What is 62 + 57?"}]
    body = {"messages": messages, "max_tokens": 100, "temperature": 0.0, "stop": ["\n"], "seed": 1234}
    (choice,) = ask(server, body, "/v1/chat/completions")
    assert choice["message"]["content"] == "62 + 57 = 119."
