"""/v1/completions with a fake engine."""

import json
import threading
from typing import Any

import pytest
from openai.types import Completion
from starlette.testclient import TestClient

from shoal.errors import QueueFull, RequestError
from shoal.params import SamplingParams
from shoal.server.api.request_parameters import check_tokens
from shoal.server.app import openai_app
from shoal.server.settings import ServerSettings
from shoal.text.prompts import Job
from support.fake_backend import FakeBackend


def ask(backend: FakeBackend | None = None, **body: Any) -> Any:
    app = openai_app(backend or FakeBackend(), ServerSettings(served_model_names=("demo", "other")))
    return TestClient(app, raise_server_exceptions=False).post("/v1/completions", json=body)


def streamed(backend: FakeBackend, **body: Any) -> tuple[dict[int, dict[str, Any]], list[Any]]:
    """Return the choices that a client makes of the chunks, and all chunks."""
    text = ask(backend, **body, stream=True).text
    chunks = [json.loads(part.removeprefix("data: ")) for part in text.split("\n\n")[:-2]]
    found: dict[int, dict[str, Any]] = {}
    for chunk in chunks:
        plain = [
            {**each, "finish_reason": each["finish_reason"] or "stop", "logprobs": None} for each in chunk["choices"]
        ]
        Completion.model_validate(chunk | {"choices": plain})  # OpenAI's types do not allow null for the first token
        for choice in chunk["choices"]:
            mine = found.setdefault(choice["index"], {"text": "", "finish_reason": None, "logprobs": None})
            mine["text"] += choice["text"]
            mine["finish_reason"] = choice["finish_reason"] or mine["finish_reason"]
            mine |= {name: choice[name] for name in ("prompt_logprobs",) if name in choice}
            if choice["logprobs"] is not None:
                known = mine["logprobs"] or {name: [] for name in choice["logprobs"]}
                mine["logprobs"] = {name: known[name] + choice["logprobs"][name] for name in known}
    return found, chunks


def test_outputs_of_several_prompts_are_numbered_prompt_by_prompt() -> None:
    backend = FakeBackend(lambda job: [f"<{job.prompt}", ">"])
    body = ask(backend, prompt=["a", "b"], n=2, model="other").json()
    answer = Completion.model_validate(body)
    assert [(c.index, c.text) for c in answer.choices] == [(0, "<a>"), (1, "<a>"), (2, "<b>"), (3, "<b>")]
    assert (answer.model, body["usage"]["prompt_tokens_details"]) == ("other", {"cached_tokens": 6})
    found, _ = streamed(backend, prompt=["a", "b"], n=2)
    assert {index: each["text"] for index, each in found.items()} == {0: "<a>", 1: "<a>", 2: "<b>", 3: "<b>"}
    assert all(stream.job.params.max_tokens == 16 for stream in backend.streams)


@pytest.mark.parametrize("prompt", ["hello there", ["hello there"], [5, 6, 7], [[5, 6, 7]]])
@pytest.mark.parametrize("body", [{}, {"echo": True}, {"logprobs": 1}, {"echo": True, "logprobs": 1}])
def test_a_stream_adds_up_to_the_answer(prompt: Any, body: dict[str, Any]) -> None:
    backend = FakeBackend()
    options = {"include_usage": True}
    whole = ask(backend, prompt=prompt, **body).json()
    found, chunks = streamed(backend, prompt=prompt, **body, stream_options=options)
    (choice,) = whole["choices"]
    assert found[0] == {name: choice[name] for name in found[0]}
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], whole["usage"])


@pytest.mark.parametrize("body", [{"echo": True, "logprobs": 1}, {"prompt_logprobs": 1}])
def test_outputs_begin_when_the_log_probabilities_of_their_prompt_are_complete(body: dict[str, Any]) -> None:
    """They come with the first output of the prompt, and other outputs may have tokens before it."""
    backend = FakeBackend(lambda _: ["a", "b"], last_first=True)
    asked = {"prompt": ["hello there", "good day"], "n": 2, "temperature": 1, **body}
    whole = ask(backend, **asked).json()["choices"]
    found, _ = streamed(backend, **asked)
    for choice in whole:
        mine = found[choice["index"]]
        assert mine == {name: choice[name] for name in mine}
        assert all(each is not None for each in choice.get("prompt_logprobs", [None])[1:])
    assert sorted(found) == [choice["index"] for choice in whole] == [0, 1, 2, 3]


def test_log_probabilities_of_the_prompt_come_without_any_text() -> None:
    found, chunks = streamed(FakeBackend(lambda _: ["", "a"]), prompt=[40, 41], prompt_logprobs=0)
    assert [each is None for each in found[0]["prompt_logprobs"]] == [True, False]
    assert "prompt_logprobs" in chunks[0]["choices"][0]


def test_usage_in_each_chunk_counts_cached_tokens() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    _, chunks = streamed(FakeBackend(), prompt="hello", stream_options=options)
    assert [chunk["usage"]["prompt_tokens_details"]["cached_tokens"] for chunk in chunks] == [3] * len(chunks)
    _, chunks = streamed(FakeBackend(), prompt="hello", stream_options={"continuous_usage_stats": True})
    assert all("usage" not in chunk for chunk in chunks)


@pytest.mark.parametrize("max_tokens", [0, 1])
@pytest.mark.parametrize("prompt", ["hello there", [40, 41, 42]])
def test_log_likelihoods_of_a_prompt_are_returned(prompt: Any, max_tokens: int) -> None:
    """Evaluations ask for them with `echo` and `logprobs`, and an output of no token or one."""
    backend = FakeBackend(lambda _: ["x"], finish="length")
    body = {"prompt": prompt, "echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0}
    answer = ask(backend, **body).json()
    job = backend.streams[0].job
    assert (job.params.prompt_logprobs, job.params.logprobs, job.params.max_tokens) == (1, 1, 1)
    (choice,) = answer["choices"]
    logprobs = choice["logprobs"]
    said = [] if max_tokens == 0 else backend.tokenizer.encode("x", add_special_tokens=False)
    tokens = [*job.tokens, *said]
    assert logprobs["tokens"] == [backend.tokenizer.token_text(token) for token in tokens]
    assert logprobs["token_logprobs"] == [None] + [-1.5] * (len(tokens) - 1)
    assert logprobs["top_logprobs"][0] is None
    assert all(max(top, key=top.get) == backend.tokenizer.token_text(5) for top in logprobs["top_logprobs"][1:])
    added = 1 if isinstance(prompt, str) else 0  # the tokenizer adds a token before a text
    lengths = [0] * added + [len(token) for token in logprobs["tokens"][added:]]
    assert logprobs["text_offset"] == [sum(lengths[:i]) for i in range(len(tokens))]
    text = "hello there" if isinstance(prompt, str) else backend.tokenizer.decode(prompt, skip_special_tokens=False)
    assert choice["text"] == text + ("x" if max_tokens else "")
    assert (choice["finish_reason"], answer["usage"]["completion_tokens"]) == ("length", len(said))


@pytest.mark.parametrize("wanted", [None, True, False])
def test_special_tokens_are_added_to_a_prompt_unless_refused(wanted: bool | None) -> None:
    """A client that has added them itself asks the server not to add them."""
    backend = FakeBackend()
    assert ask(backend, prompt="hi", add_special_tokens=wanted).status_code == 200
    bare = tuple(backend.tokenizer.encode("hi", add_special_tokens=False))
    assert backend.streams[0].job.tokens == (bare if wanted is False else (0, *bare))


def test_a_prompt_that_is_too_long_has_the_code_that_clients_look_for() -> None:
    for prompt in ([5] * 600, "hi " * 100_000):
        error = ask(prompt=prompt).json()["error"]
        assert (error["code"], error["param"]) == ("context_length_exceeded", "prompt")
        assert error["message"].startswith("this model's maximum context length is 512 tokens")


def test_lines_of_a_stream_end_only_at_line_feeds() -> None:
    """Some clients split lines at every line end that Unicode knows."""
    text = "a\u2028b\u2029c\x85d"
    answer = ask(FakeBackend(says=lambda job: [text]), prompt="hi", stream=True).text
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
    assert events.pop() == "[DONE]"
    assert "".join(choice["text"] for event in events for choice in json.loads(event)["choices"]) == text


def test_prompt_logprobs_are_returned() -> None:
    (choice,) = ask(prompt=[40, 41], prompt_logprobs=0).json()["choices"]
    assert choice["prompt_logprobs"][0] is None
    assert list(choice["prompt_logprobs"][1]) == ["41"]


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": [1, "a"]}, 400, "prompt"),
        ({"prompt": ["a", 1]}, 400, "prompt[1]"),
        ({"prompt": ["a", ""]}, 400, "prompt[1]"),
        ({"prompt": [[5], [99999]]}, 400, "prompt[1]"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": {"a": 1}}, 400, "prompt"),
        ({"prompt": "a", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "a", "max_tokens": -5}, 400, "max_tokens"),
        ({"prompt": "a", "best_of": 3}, 400, "best_of"),
        ({"prompt": "a", "suffix": "b"}, 400, "suffix"),
        ({"prompt": "a", "stream_options": {"include_usage": True}}, 400, "stream_options"),
        ({"prompt": ["a"] * 2049}, 400, "prompt"),
        ({"prompt": "a", "n": 2049}, 400, "n"),
        ({"prompt": ["a"] * 3, "n": 1000}, 400, "prompt"),
        ({"prompt": "a", "logprobs": True}, 400, "logprobs"),
        ({"prompt": "a", "model": "third"}, 404, "model"),
    ],
)
def test_errors_name_the_field(body: dict[str, Any], status: int, param: str) -> None:
    backend = FakeBackend()
    answer = ask(backend, **body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text
    assert not backend.streams


@pytest.mark.parametrize("stream", [False, True])
def test_if_one_prompt_fails_the_whole_request_ends(stream: bool) -> None:
    backend = FakeBackend(error=QueueFull("full", 1))
    answer = ask(backend, prompt=["a", "b", "c"], stream=stream)
    assert answer.status_code == 429
    assert len(backend.streams) == 3
    assert all(each.closed for each in backend.streams)


def test_fields_without_effect_are_accepted() -> None:
    assert ask(prompt="a", user="u", best_of=1, suffix=None, store=True, metadata={"a": "b"}).status_code == 200


@pytest.mark.parametrize(
    ("body", "param", "numbers"),
    [
        ({"n": 2048, "allowed_token_ids": list(range(2500))}, "allowed_token_ids", ("4194304", "2500", "2048")),
        ({"n": 2048, "stop_token_ids": list(range(600))}, "stop_token_ids", ("1048576", "600", "2048")),
        ({"n": 2048, "logit_bias": {str(i): 1 for i in range(600)}}, "logit_bias", ("1048576", "600", "2048")),
        ({"n": 2048, "bad_words": [f"{i:010d}" for i in range(60)]}, "bad_words", ("1048576", "600", "2048")),
        ({"prompt": ["a"] * 64, "n": 32, "stop_token_ids": list(range(600))}, "stop_token_ids", ("600", "2048")),
    ],
)
def test_parameters_have_a_limit_that_counts_all_outputs(
    body: dict[str, Any], param: str, numbers: tuple[str, ...]
) -> None:
    answer = ask(**{"prompt": "a", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert all(number in error["message"] for number in numbers)


def test_prompts_have_a_limit_that_counts_all_outputs() -> None:
    backend = FakeBackend()
    body = {"prompt": [[5] * 500] * 40, "n": 50}
    assert ask(backend, **body, max_tokens=1).status_code == 200
    params = SamplingParams(n=2048)
    with pytest.raises(RequestError, match="33554432 tokens over all outputs, got 33556480"):
        check_tokens([Job(0, None, (5,) * 16_385, params)], params)


def test_repeated_entries_count_once() -> None:
    backend = FakeBackend()
    assert ask(backend, prompt="a", n=100, stop_token_ids=[5, 6] * 150_000).status_code == 200
    assert backend.streams[0].job.params.stop_token_ids == (5, 6)


def test_large_requests_and_answers_are_handled_off_the_event_loop() -> None:
    """Small requests and answers are handled on the event loop."""
    threads = []

    class Backend(FakeBackend):
        def prepare(self, *arguments: Any, **more: Any) -> Job:
            threads.append(threading.current_thread().name)
            return super().prepare(*arguments, **more)

    backend = Backend()
    assert ask(backend, prompt="a", user="x" * 20_000).status_code == 200
    assert ask(backend, prompt="a", bad_words=["b"]).status_code == 200
    assert ask(backend, prompt="a").status_code == 200
    assert [name == "shoal-work" for name in threads] == [True, True, False]
