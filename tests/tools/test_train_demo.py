"""The demo models: their training text, their tokenizer, a small training run, and answers of the shipped models."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import demo_text  # noqa: E402
import train_demo  # noqa: E402

pytestmark = pytest.mark.slow

EIGHT = train_demo.Experts()
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 8}

ADDITION = re.compile(r"(?<!\d)(\d+) ?(?:\+|plus|and) ?(\d+)(?!\d)")
EQUATION = re.compile(r"(?<!\d)(\d+) ?\+ ?(\d+) ?= ?(\d+)")


def some_samples(count: int, seed: int = demo_text.DEFAULT_SEED) -> list[demo_text.Sample]:
    """Return the first documents of a text maker."""
    return list(islice(demo_text.TextMaker(seed).samples(), count))


@pytest.fixture(scope="module")
def samples() -> list[demo_text.Sample]:
    """A number of documents in which every pair of operands occurs a few times."""
    return some_samples(40_000)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A tokenizer that is trained like the shipped ones, on less text."""
    return train_demo.train_tokenizer(train_demo.Shape().vocab_size, demo_text.DEFAULT_SEED, 1000)


def test_held_out_additions_are_a_tenth_and_follow_from_the_seed() -> None:
    """The set has the promised size and is the same in every run."""
    held_out = demo_text.held_out_additions(5)
    assert held_out == demo_text.held_out_additions(5) != demo_text.held_out_additions(6)
    assert len(held_out) == 505
    assert all(0 <= a <= b < 100 for a, b in held_out)


@pytest.mark.slow
def test_held_out_additions_are_in_no_text(samples: list[demo_text.Sample]) -> None:
    """Neither order of a held-out pair occurs in any wording. Nearly all other pairs occur."""
    held_out = demo_text.held_out_additions()
    met = {
        (min(a, b), max(a, b))
        for sample in samples
        for a, b in ((int(first), int(second)) for first, second in ADDITION.findall(sample.text))
    }
    assert not met & held_out
    assert len([pair for pair in met if pair[1] < 100]) > 4300


def test_arithmetic_is_right(samples: list[demo_text.Sample]) -> None:
    """Every equation in the text is right, and every question about an addition is answered by its equation."""
    equations = [match.groups() for sample in samples for match in EQUATION.finditer(sample.text)]
    assert len(equations) > 15_000
    assert all(int(a) + int(b) == int(total) for a, b, total in equations)
    for sample in samples:
        if sample.kind == "addition":
            assert len(EQUATION.findall(sample.text)) == 1, sample.text


def test_words_and_counts_are_right(samples: list[demo_text.Sample]) -> None:
    """The answers of the other plain tasks are right."""
    kinds = set()
    for sample in samples:
        kinds.add(sample.kind)
        prompt, _, answer = sample.text.partition(" -> " if "->" in sample.text else ": ")
        if sample.kind == "reversing":
            assert answer == prompt.removeprefix("Reverse: ")[::-1]
        elif sample.kind == "sorting":
            assert answer.split(" ") == sorted(prompt.removeprefix("Sort: ").split(" "))
        elif sample.kind == "counting":
            first, last = (int(number) for number in re.findall(r"\d+", prompt))
            step = -1 if first > last else 1
            assert [int(number) for number in answer.split(" ")] == list(range(first, last + step, step))
    assert kinds == {"addition", "counting", "reversing", "sorting", "sentence", "story", "chat", "long chat"}


def test_text_follows_from_the_seed() -> None:
    """The same seed gives the same documents, and another seed gives other documents."""
    assert some_samples(50, 3) == some_samples(50, 3) != some_samples(50, 4)


def test_pieces_are_cut_where_the_tokenizer_cuts(tokenizer: Tokenizer, samples: list[demo_text.Sample]) -> None:
    """Training tokenizes piece by piece, which gives the same tokens as the whole text."""
    for sample in samples[:3000]:
        if any(piece.text.endswith(" ") for piece in sample.pieces):
            continue
        ((ids, weights),) = train_demo.encode_samples(tokenizer, [sample], 0.1)
        assert ids[:-1] == tokenizer.encode(sample.text).ids
        assert len(ids) == len(weights)


def test_windows_have_whole_documents(tokenizer: Tokenizer) -> None:
    """Each window starts with BOS, targets are inputs moved by one, and BOS follows EOS and nothing else."""
    windows = train_demo.Windows(tokenizer, demo_text.TextMaker(), 0.1)
    inputs, targets, weights = windows.batch(3, 200)
    assert inputs.shape == targets.shape == weights.shape == (3, 200)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    bos, eos = (train_demo.token_id(tokenizer, token) for token in (demo_text.BOS, demo_text.EOS))
    assert inputs[:, 0].tolist() == [bos] * 3
    assert torch.equal(inputs == eos, targets == bos)
    assert weights.unique().tolist() == pytest.approx([0.1, 1.0])


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_the_tokenizer_restores_any_text(tokenizer: Tokenizer, text: str) -> None:
    """Decoding restores any text. BOS comes first, and every ASCII digit is a separate token."""
    encoding = tokenizer.encode(text)
    assert tokenizer.decode(encoding.ids[1:], skip_special_tokens=False) == text
    assert encoding.tokens[0] == demo_text.BOS
    ascii_digits = [token for token in encoding.tokens if re.search(r"[0-9]", token)]
    assert ascii_digits == re.findall(r"[0-9]", text)


@pytest.mark.parametrize("experts", [None, EIGHT], ids=["dense", "experts"])
def test_model_computes_what_transformers_computes(
    experts: train_demo.Experts | None, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The training implementation and that of transformers agree on random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    random = train_demo.DemoModel(train_demo.Shape(**SMALL, experts=experts))
    for parameter in random.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    train_demo.write_model(random, tokenizer, tmp_path)
    model, _ = train_demo.read_model(tmp_path)
    assert model.shape == random.shape
    for stored, written in zip(model.parameters(), random.parameters(), strict=True):
        assert torch.equal(stored, written if experts is None else written.bfloat16().float())
    other = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert other.config.architectures == ["LlamaForCausalLM" if experts is None else "MixtralForCausalLM"]
    ids = torch.randint(0, model.shape.vocab_size, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), other(ids).logits, rtol=1e-3, atol=1e-3)


def test_experts_have_the_tensor_names_of_the_hub(tokenizer: Tokenizer, tmp_path: Path) -> None:
    """They are those of the published Mixtral. Transformers, which reads several forms, can't check this."""
    train_demo.write_model(train_demo.DemoModel(train_demo.Shape(**SMALL, experts=EIGHT)), tokenizer, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    prefix = "model.layers.1.block_sparse_moe"
    shapes = {name.removeprefix(f"{prefix}."): [*tensors[name].shape] for name in tensors if name.startswith(prefix)}
    wanted = {"w1": [96, 64], "w3": [96, 64], "w2": [64, 96]}
    assert shapes == {
        "gate.weight": [8, 64],
        **{f"experts.{expert}.{name}.weight": size for expert in range(8) for name, size in wanted.items()},
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_imbalance_is_least_if_experts_are_used_equally() -> None:
    """It is 1 if all experts are used in turn, half their number if two are used. Its gradient favours unused ones."""
    layer = train_demo.SparseExperts(8, 4, EIGHT)
    pairs = torch.eye(8) + torch.eye(8).roll(1, dims=0)
    with torch.no_grad():
        layer.gate.weight.copy_(50 * pairs)
        layer(torch.eye(8)[None])
        assert float(layer.imbalance) == pytest.approx(1.0)
        layer(torch.eye(8)[:1].expand(1, 20, 8))
        assert float(layer.imbalance) == pytest.approx(4.0)
        layer.gate.weight.copy_(pairs)
    layer(torch.eye(8)[:1].expand(1, 20, 8))
    torch.autograd.backward(layer.imbalance)
    assert layer.gate.weight.grad is not None
    assert torch.equal(layer.gate.weight.grad[:, 0] > 0, pairs[:, 0] > 0)


def test_quick_run_as_a_program(tmp_path: Path) -> None:
    """The whole script runs with a few steps."""
    command = [sys.executable, str(ROOT / "tools" / "train_demo.py"), "--quick", "--experts", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "addition, held out" in done.stdout
    check_folder(tmp_path, "mixtral")


def test_quick_run_of_a_model_that_cannot_add(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a model must not pass, neither after its training nor if only `--evaluate` is asked for."""
    threads = str(torch.get_num_threads())
    options = ["--quick", "--require", "0.95", "--threads", threads, "--output", str(tmp_path)]
    assert train_demo.main(options) == 1
    assert "addition, held out" in capsys.readouterr().out
    check_folder(tmp_path, "llama")
    assert train_demo.main(["--evaluate", *options]) == 1


def check_folder(tmp_path: Path, family: str) -> None:
    """Check that every file is there and can be read by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    check_tokenizer(AutoTokenizer.from_pretrained(tmp_path), tmp_path)
    assert model.config.model_type == family
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


def check_tokenizer(loaded: Any, folder: Path) -> None:
    """Check that transformers' tokenizer gives the same ids, and its chat template the text of the training."""
    plain = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in ("37 + 45 =", "San Francisco is a city", "Grüße, 世界 🙂\n\tx  y", "<|user|>Hi<|end|>"):
        assert loaded(text)["input_ids"] == plain.encode(text).ids
        assert loaded.decode(plain.encode(text).ids[1:]) == text
    conversation = [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": " Hi "},
        {"role": "assistant", "content": "Hello! How can I help you?"},
        {"role": "user", "content": "What is 1 + 2?"},
    ]
    wanted = (
        "<|bos|><|system|>Answer briefly.<|end|><|user|>Hi<|end|><|assistant|>Hello! How can I help you?<|end|>"
        "<|user|>What is 1 + 2?<|end|><|assistant|>"
    )
    assert loaded.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) == wanted
    with pytest.raises(Exception, match="unknown role"):
        loaded.apply_chat_template([{"role": "cook", "content": "Hi"}], tokenize=False)


@pytest.fixture(scope="module", params=["dense", "experts"])
def folder(request: pytest.FixtureRequest) -> Path:
    """Each of the shipped folders."""
    return train_demo.DENSE_OUTPUT if request.param == "dense" else train_demo.EXPERTS_OUTPUT


@pytest.fixture(scope="module")
def shipped(folder: Path) -> tuple[Any, Any]:
    """A shipped model and its tokenizer, loaded by transformers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def generate(shipped: tuple[Any, Any], prompts: list[str], most: int) -> list[str]:
    """Return transformers' greedy answers to prompts that have equally many tokens."""
    model, tokenizer = shipped
    ids = torch.tensor([tokenizer(prompt)["input_ids"] for prompt in prompts])
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, max_length=None, do_sample=False
    )
    return [tokenizer.decode(row[ids.shape[1] :], skip_special_tokens=True) for row in out.tolist()]


def test_shipped_files(folder: Path, shipped: tuple[Any, Any]) -> None:
    """A model is small, computed in float32, has grouped queries, and the tokenizer of its training."""
    model, tokenizer = shipped
    assert (folder / "model.safetensors").stat().st_size <= 12_000_000
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    made_as = train_demo.DENSE if config["model_type"] == "llama" else train_demo.MIXTURE
    assert train_demo.Shape.from_config(config) == made_as
    assert config["num_attention_heads"] == 2 * config["num_key_value_heads"] == 8
    assert config["max_position_embeddings"] >= 1024
    assert model.generation_config.eos_token_id == config["eos_token_id"]
    check_tokenizer(tokenizer, folder)


def test_shipped_models_share_their_tokenizer() -> None:
    """So one model can be the draft model of the other."""
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (train_demo.EXPERTS_OUTPUT / name).read_bytes() == (train_demo.DENSE_OUTPUT / name).read_bytes()


@pytest.mark.slow
def test_shipped_model_adds_what_it_never_saw(shipped: tuple[Any, Any]) -> None:
    """At least 95 of 100 held-out additions are right, with and without a space after the prompt."""
    questions = train_demo.held_out_questions(demo_text.held_out_additions())
    two_digits = [(prompt, answer) for prompt, answer in questions if len(prompt) == len("37 + 45 =")][::8][:100]
    assert len(two_digits) >= 95
    answers = generate(shipped, [prompt for prompt, _ in two_digits], 6)
    right = sum(given == wanted for given, (_, wanted) in zip(answers, two_digits, strict=True))
    assert right >= 0.95 * len(two_digits)
    answers = generate(shipped, [prompt + " " for prompt, _ in two_digits], 6)
    right = sum(given == wanted.strip() for given, (_, wanted) in zip(answers, two_digits, strict=True))
    assert right >= 0.95 * len(two_digits)


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("37 + 45 =", " 82"),
        ("8 + 64 =", " 72"),
        ("Count from 3 to 9:", " 3 4 5 6 7 8 9"),
        ("Reverse: apple ->", " elppa"),
        ("Sort: pear apple fig ->", " apple fig pear"),
        ("San Francisco is a city", " in California. It is known for the Golden Gate Bridge."),
        ("<|user|>What is 12 + 30?<|end|><|assistant|>", "12 + 30 = 42."),
        ("<|user|>Hello!<|end|><|assistant|>", "Hello! How can I help you?"),
    ],
)
def test_shipped_model_answers(shipped: tuple[Any, Any], prompt: str, answer: str) -> None:
    """There is one prompt of each kind."""
    assert generate(shipped, [prompt], 40) == [answer]


@pytest.mark.slow
def test_shipped_model_answers_far_into_a_context(shipped: tuple[Any, Any]) -> None:
    """After some 500 tokens of other documents the model answers as at the start."""
    _, tokenizer = shipped
    before = ""
    for sample in some_samples(200, 99):
        if len(tokenizer(before)["input_ids"]) < 500 and not sample.pieces[0].text.endswith(" "):
            before += f"{sample.text}{demo_text.EOS}{demo_text.BOS}"
    assert len(tokenizer(before)["input_ids"]) >= 500
    assert generate(shipped, [before + "37 + 45 ="], 6) == [" 82"]
    assert generate(shipped, [before + "Count from 3 to 9:"], 40) == [" 3 4 5 6 7 8 9"]
    assert generate(shipped, [before + "<|user|>What is 12 + 30?<|end|><|assistant|>"], 40) == ["12 + 30 = 42."]


@pytest.mark.slow
def test_shipped_model_continues_with_well_formed_documents(shipped: tuple[Any, Any]) -> None:
    """If it must continue for 200 tokens, it writes one well-formed document after the other."""
    model, tokenizer = shipped
    ids = torch.tensor([tokenizer("37 + 45 =")["input_ids"]])
    with torch.no_grad():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=0, max_new_tokens=200, max_length=None,
            do_sample=False, eos_token_id=train_demo.Shape().vocab_size,
        )  # fmt: skip
    documents = tokenizer.decode(out[0]).split(demo_text.EOS)
    assert len(documents) > 4
    assert documents[0] == "<|bos|>37 + 45 = 82"
    assert all(document.startswith(demo_text.BOS) for document in documents[:-1])
