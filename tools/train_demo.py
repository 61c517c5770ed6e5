"""Make the bundled demo models: small ones that add, count, reverse words, sort words and chat a little.

    python tools/train_demo.py                       # the dense model, into src/shoal/demo_model
    python tools/train_demo.py --experts             # the mixture of experts, into src/shoal/demo_moe_model
    python tools/train_demo.py --quick --output DIR  # a few steps: tests the program, learns nothing
    python tools/train_demo.py --evaluate            # only evaluates the existing dense model

The text comes from `demo_text.py`, the tokenizer is trained on the same text, and the model is a plain implementation
of the llama architecture below, so the program needs only torch, tokenizers and safetensors. With `--experts` every
feed-forward layer is one of Mixtral: a router and eight narrow experts, of which each token uses two. The model is
written in the Hugging Face format and loads as `LlamaForCausalLM` or `MixtralForCausalLM`. At the end the written model
is read back and answers every held-out addition and samples of the other tasks. The exit status is 1 if it answers less
than 95 % of the held-out additions correctly.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

import demo_text
from demo_text import ASSISTANT, BOS, END, EOS, SPECIAL_TOKENS, SYSTEM, USER, Sample, TextMaker

PACKAGE = Path(__file__).resolve().parent.parent / "src" / "shoal"
DENSE_OUTPUT = PACKAGE / "demo_model"
EXPERTS_OUTPUT = PACKAGE / "demo_moe_model"
PASS_SHARE = 0.95
"""The share of held-out additions that must be right."""

SPREAD = 0.05
"""Standard deviation of the first weights. The usual 0.02 suits wide models; at this width the loss after 500 steps
was 0.67 with 0.05 and 0.83 with 0.02, and addition was learnt sooner."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('unknown role: ' ~ message['role']) }}"
    "{% endif %}"
    "{{ '<|' ~ message['role'] ~ '|>' ~ (message['content'] | trim) ~ '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
assert (SYSTEM, USER, ASSISTANT, END) == ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")


@dataclass(frozen=True)
class Experts:
    """The sizes that a mixture of experts adds to a shape, with the names of the Hugging Face configuration."""

    num_local_experts: int = 8
    num_experts_per_tok: int = 2
    router_aux_loss_coef: float = 0.01


@dataclass(frozen=True)
class Shape:
    """The sizes of the model, with the names of the Hugging Face configuration.

    With `experts`, `intermediate_size` is the width of one expert.
    """

    vocab_size: int = 640
    hidden_size: int = 256
    intermediate_size: int = 640
    num_hidden_layers: int = 4
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int = 32
    max_position_embeddings: int = 1024
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    experts: Experts | None = None

    def to_config(self) -> dict[str, Any]:
        """Return the keys of `config.json` that give the shape."""
        sizes = asdict(self)
        experts: dict[str, Any] | None = sizes.pop("experts")
        return {**sizes, **(experts or {})}

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Shape:
        """Return the shape in a `config.json` that may have other keys, too."""
        sizes = {field.name: config[field.name] for field in fields(Shape) if field.name != "experts"}
        routed = {field.name: config[field.name] for field in fields(Experts) if field.name in config}
        return Shape(**sizes, experts=Experts(**routed) if routed else None)


DENSE = Shape()
MIXTURE = Shape(intermediate_size=128, experts=Experts())
"""Eight experts of a fifth of the dense width: a token passes through less than in the dense model, and there is more
to choose from. Together they have 1.6 times the dense weights."""


@dataclass(frozen=True)
class Recipe:
    """The settings of the training.

    A step uses `tokens` tokens, in windows of `window` tokens at first and of twice as many in the last `long_share` of
    the steps. `prompt_weight` is the weight of prompt tokens in the loss.
    """

    steps: int = 3000
    tokens: int = 2048
    window: int = 256
    long_share: float = 0.25
    peak_rate: float = 2e-3
    final_rate: float = 2e-5
    warmup: int = 100
    weight_decay: float = 0.1
    prompt_weight: float = 0.1
    clip: float = 1.0
    seed: int = demo_text.DEFAULT_SEED
    minutes: float = 28.0
    bf16: bool = True


EXPERTS_STEPS = 4500
"""An expert sees a quarter of the tokens, so a mixture is given more of them."""


# The tokenizer


def train_tokenizer(vocab_size: int, seed: int, documents: int = 20000) -> Tokenizer:
    """Return a byte-level BPE tokenizer. It restores any text, makes every digit a token, and puts BOS first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(demo_text.tokenizer_corpus(seed, documents), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, token_id(tokenizer, BOS))],
    )
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the id of a token that exists."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise KeyError(token)
    return int(found)


def encode_samples(
    tokenizer: Tokenizer, samples: Sequence[Sample], prompt_weight: float
) -> list[tuple[list[int], list[float]]]:
    """Yield two lists of equal length for each document, with BOS and EOS: token ids and weights in the loss.

    A weight applies to the prediction of its token. EOS counts fully, BOS very little.
    """
    texts = [piece.text for sample in samples for piece in sample.pieces]
    encoded = iter(tokenizer.encode_batch(texts, add_special_tokens=False))
    bos, eos = token_id(tokenizer, BOS), token_id(tokenizer, EOS)
    documents: list[tuple[list[int], list[float]]] = []
    for sample in samples:
        ids: list[int] = [bos]
        weights: list[float] = [prompt_weight]
        for piece in sample.pieces:
            tokens: list[int] = next(encoded).ids
            ids += tokens
            weights += [1.0 if piece.learnt else prompt_weight] * len(tokens)
        documents.append(([*ids, eos], [*weights, 1.0]))
    return documents


class Windows:
    """Packs complete documents, one after the other, into windows of a fixed length.

    A window begins with a document, and its last document is cut at the end of the window. No mask hides earlier
    documents from later ones: the model learns to look back no further than the last BOS, so its answers do not depend
    on the position.
    """

    def __init__(self, tokenizer: Tokenizer, maker: TextMaker, prompt_weight: float) -> None:
        self._tokenizer = tokenizer
        self._samples = maker.samples()
        self._prompt_weight = prompt_weight
        self._documents: Iterator[tuple[list[int], list[float]]] = self._encoded()

    def _encoded(self) -> Iterator[tuple[list[int], list[float]]]:
        while True:
            chunk = [next(self._samples) for _ in range(512)]
            yield from encode_samples(self._tokenizer, chunk, self._prompt_weight)

    def batch(self, windows: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return inputs, targets and weights of the targets, each `(windows, length)`."""
        ids = torch.empty(windows, length + 1, dtype=torch.long)
        weights = torch.empty(windows, length + 1)
        for row in range(windows):
            row_ids: list[int] = []
            row_weights: list[float] = []
            while len(row_ids) < length + 1:
                document_ids, document_weights = next(self._documents)
                row_ids += document_ids
                row_weights += document_weights
            ids[row] = torch.tensor(row_ids[: length + 1])
            weights[row] = torch.tensor(row_weights[: length + 1])
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), weights[:, 1:].contiguous()


# The model


class SwiGlu(nn.ModuleDict):
    """A gated feed-forward network. The caller gives the names of its three matrices in the checkpoint."""

    def __init__(self, hidden: int, inner: int, *, gate: str, up: str, down: str) -> None:
        super().__init__(
            {
                gate: nn.Linear(hidden, inner, bias=False),
                up: nn.Linear(hidden, inner, bias=False),
                down: nn.Linear(inner, hidden, bias=False),
            }
        )
        self.names = gate, up, down

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output `(..., hidden)` for an input `(..., hidden)`."""
        gate, up, down = self.names
        out: Tensor = self[down](functional.silu(self[gate](x)) * self[up](x))
        return out


class SparseExperts(nn.Module):
    """The feed-forward layer of Mixtral (Jiang et al. 2024): a router picks a few experts for each token.

    The weight of an expert is its share in the softmax over the logits of the picked experts, which is the same as the
    softmax over all experts, normalised over the picked ones.
    """

    def __init__(self, hidden: int, inner: int, experts: Experts) -> None:
        super().__init__()
        self.picked = experts.num_experts_per_tok
        self.gate = nn.Linear(hidden, experts.num_local_experts, bias=False)
        self.experts = nn.ModuleList(
            SwiGlu(hidden, inner, gate="w1", up="w3", down="w2") for _ in range(experts.num_local_experts)
        )
        self.imbalance = torch.zeros(())
        """Of the last forward; see `forward`."""

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output for an input `(batch, length, hidden)`, and set `imbalance`.

        `imbalance` is the auxiliary loss of the Switch Transformer (Fedus et al. 2021, equation 4), over all picks of a
        token: the number of experts times the sum, over the experts, of the share of picks times the mean probability.
        It is 1 if all experts are used equally, and the number of experts if only one is used.
        """
        tokens = x.flatten(0, 1)
        with torch.autocast("cpu", enabled=False):  # rounded logits would pick other experts than those used later
            probabilities = self.gate(tokens.float()).softmax(dim=-1)
        shares, picks = probabilities.topk(self.picked, dim=-1)
        shares = shares / shares.sum(dim=-1, keepdim=True)
        order = picks.flatten().argsort(stable=True)
        counts = picks.flatten().bincount(minlength=len(self.experts))
        self.imbalance = len(self.experts) * (counts / counts.sum() * probabilities.mean(dim=0)).sum()
        # Sorted by expert, so that each expert is three products of one block of rows.
        blocks = tokens.index_select(0, order // self.picked).split(counts.tolist())
        outs = torch.cat([expert(block) for expert, block in zip(self.experts, blocks, strict=True)])
        back = outs.index_select(0, order.argsort()).view(*shares.shape, -1)
        mixed: Tensor = (back * shares[..., None]).sum(dim=1)
        return mixed.view(x.shape)


class Layer(nn.Module):
    """A layer: grouped-query attention with rotary positions, then a SwiGLU or experts, each after an RMSNorm.

    The attributes have the names of the Hugging Face checkpoint, so that the state dict is the checkpoint.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden, inner = shape.hidden_size, shape.intermediate_size
        q_width = shape.num_attention_heads * shape.head_dim
        kv_width = shape.num_key_value_heads * shape.head_dim
        self.shape = shape
        self.input_layernorm = nn.RMSNorm(hidden, eps=shape.rms_norm_eps)
        self.self_attn = nn.ModuleDict(
            {
                "q_proj": nn.Linear(hidden, q_width, bias=False),
                "k_proj": nn.Linear(hidden, kv_width, bias=False),
                "v_proj": nn.Linear(hidden, kv_width, bias=False),
                "o_proj": nn.Linear(q_width, hidden, bias=False),
            }
        )
        self.post_attention_layernorm = nn.RMSNorm(hidden, eps=shape.rms_norm_eps)
        if shape.experts is None:
            self.mlp = SwiGlu(hidden, inner, gate="gate_proj", up="up_proj", down="down_proj")
        else:
            self.block_sparse_moe = SparseExperts(hidden, inner, shape.experts)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Compute the output for `x`, `(batch, length, hidden)`; `cos` and `sin` are `(length, head_dim // 2)`."""
        batch, length, _ = x.shape
        shape = self.shape

        def heads(name: str, count: int) -> Tensor:
            """Return a projection of `x` as `(batch, heads, length, head_dim)`."""
            flat: Tensor = self.self_attn[name](normed)
            return flat.view(batch, length, count, shape.head_dim).transpose(1, 2)

        normed = self.input_layernorm(x)
        q = rotate(heads("q_proj", shape.num_attention_heads), cos, sin)
        k = rotate(heads("k_proj", shape.num_key_value_heads), cos, sin)
        v = heads("v_proj", shape.num_key_value_heads)
        group = shape.num_attention_heads // shape.num_key_value_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.self_attn["o_proj"](mixed.transpose(1, 2).reshape(batch, length, -1))
        feed_forward = self.mlp if shape.experts is None else self.block_sparse_moe
        down: Tensor = feed_forward(self.post_attention_layernorm(x))
        return x + down


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply rotary positions. The two halves of a head are paired, as llama checkpoints expect."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


class DemoModel(nn.Module):
    """A decoder with tied embeddings and without a KV cache, which is enough for training and for short answers."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight", "w2.weight"))
                spread = SPREAD / math.sqrt(2 * shape.num_hidden_layers) if into_residual else SPREAD
                nn.init.normal_(parameter, std=spread)

    def forward(self, ids: Tensor) -> Tensor:
        """Compute the logits `(batch, length, vocab)` for token ids `(batch, length)`."""
        half = self.shape.head_dim // 2
        rates = self.shape.rope_theta ** (-torch.arange(half, dtype=torch.float32) / half)
        angles = torch.arange(ids.shape[1], dtype=torch.float32)[:, None] * rates
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(ids)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return functional.linear(self.norm(x), self.embed_tokens.weight)

    def balance_loss(self) -> Tensor | float:
        """Return the term that is added to the loss so that all experts are used; 0 without experts."""
        if self.shape.experts is None:
            return 0.0
        imbalances = [part.imbalance for part in self.modules() if isinstance(part, SparseExperts)]
        return self.shape.experts.router_aux_loss_coef * torch.stack(imbalances).mean()


# Training


def rate_at(progress: float, step: int, recipe: Recipe) -> float:
    """Return the learning rate: linear warm-up in the first steps, then half a cosine over `progress` (0 to 1)."""
    wave = 0.5 * (1.0 + math.cos(math.pi * min(progress, 1.0)))
    rate = recipe.final_rate + (recipe.peak_rate - recipe.final_rate) * wave
    return rate * min(1.0, (step + 1) / recipe.warmup)


def train(
    model: DemoModel, windows: Windows, recipe: Recipe, probe: Callable[[], str] | None = None
) -> tuple[int, float]:
    """Train the model in place. Return the number of steps and the minutes that they took.

    If the machine is too slow for all steps within `recipe.minutes`, the training ends in time: the learning rate
    follows the steps or the clock, whichever is further.
    """
    matrices = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    vectors = [parameter for parameter in model.parameters() if parameter.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.peak_rate,
        betas=(0.9, 0.98),
        fused=True,
    )
    model.train()
    began = time.monotonic()
    shown = 0.0
    bar = tqdm(range(recipe.steps), desc="training", unit="step", mininterval=5.0, file=sys.stderr)
    done = 0
    for step in bar:
        progress = max(step / recipe.steps, (time.monotonic() - began) / (60.0 * recipe.minutes))
        if progress >= 1.0:
            break
        length = recipe.window * (2 if progress >= 1.0 - recipe.long_share else 1)
        inputs, targets, weights = windows.batch(max(1, recipe.tokens // length), length)
        rate = rate_at(progress, step, recipe)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bf16):
            logits = model(inputs)
        losses = functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * weights.flatten()).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss + model.balance_loss())
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        done = step + 1
        value = float(loss.detach())
        shown = value if step == 0 else 0.98 * shown + 0.02 * value
        bar.set_postfix(loss=f"{shown:.4f}", rate=f"{rate:.1e}", refresh=False)
        if probe is not None and done % 250 == 0:
            tqdm.write(f"step {done}: loss {shown:.4f}; {probe()}", file=sys.stderr)
            model.train()
    bar.close()
    return done, (time.monotonic() - began) / 60.0


# Answering and counting the right answers


@torch.no_grad()
def answer(
    model: DemoModel, tokenizer: Tokenizer, prompts: Sequence[str], limit: int = 24, batch: int = 128
) -> tuple[list[str], list[float]]:
    """Return the greedy answers up to EOS or END, in the order of the prompts, and the margin of each.

    The margin is the least difference between the best and the second best logit over the tokens of the answer. Another
    order of summation changes the answer only if it moves a logit by more. Prompts of one length share a batch, so that
    no padding is needed.
    """
    model.eval()
    stops = torch.tensor([token_id(tokenizer, EOS), token_id(tokenizer, END)])
    encoded = [encoding.ids for encoding in tokenizer.encode_batch(list(prompts))]
    by_length: dict[int, list[int]] = {}
    for index, prompt_ids in enumerate(encoded):
        by_length.setdefault(len(prompt_ids), []).append(index)
    texts = [""] * len(encoded)
    margins = [math.inf] * len(encoded)
    for length, members in by_length.items():
        for start in range(0, len(members), batch):
            rows = members[start : start + batch]
            ids = torch.tensor([encoded[index] for index in rows])
            running = torch.ones(len(rows), dtype=torch.bool)
            least = torch.full((len(rows),), math.inf)
            ends = torch.full((len(rows),), length + limit)
            for _ in range(limit):
                best = model(ids)[:, -1].topk(2, dim=-1)
                gap = best.values[:, 0] - best.values[:, 1]
                least = torch.where(running, torch.minimum(least, gap), least)
                token = best.indices[:, 0]
                stopped = running & torch.isin(token, stops)
                ends[stopped] = ids.shape[1]
                running &= ~stopped
                if not running.any():
                    break
                ids = torch.cat((ids, token[:, None]), dim=1)
            for row, index in enumerate(rows):
                texts[index] = tokenizer.decode(ids[row, length : int(ends[row])].tolist(), skip_special_tokens=False)
                margins[index] = float(least[row])
    return texts, margins


@dataclass(frozen=True)
class Figure:
    """A line of the evaluation: `right` of `asked` answers, and the least margin of the right ones."""

    name: str
    right: int
    asked: int
    margin: float

    @property
    def share(self) -> float:
        """The share of right answers."""
        return self.right / self.asked

    def __str__(self) -> str:
        """Return the line to print."""
        return f"{self.name:<44} {self.right:>5} of {self.asked:>5}  {100 * self.share:6.2f} %  {self.margin:7.2f}"


def figure(
    model: DemoModel, tokenizer: Tokenizer, name: str, asked: Sequence[tuple[str, str]], limit: int = 24, wrong: int = 3
) -> Figure:
    """Evaluate `(prompt, right answer)` pairs, and print the first few wrong answers."""
    texts, margins = answer(model, tokenizer, [prompt for prompt, _ in asked], limit)
    right = [text == wanted for text, (_, wanted) in zip(texts, asked, strict=True)]
    for ok, text, (prompt, _) in zip(right, texts, asked, strict=True):
        if not ok and wrong > 0:
            wrong -= 1
            print(f"  wrong: {prompt!r} gave {text!r}", file=sys.stderr)
    margin = min((margin for margin, ok in zip(margins, right, strict=True) if ok), default=math.nan)
    return Figure(name, sum(right), len(asked), margin)


def held_out_questions(held_out: demo_text.HeldOut) -> list[tuple[str, str]]:
    """Return every held-out addition in both orders, with its answer, in a fixed order."""
    ordered = sorted({pair for a, b in held_out for pair in ((a, b), (b, a))})
    return [(f"{a} + {b} =", f" {a + b}") for a, b in ordered]


def chat_prompt(question: str) -> str:
    """Return a question as the chat template writes it, without BOS, which the tokenizer adds."""
    return f"{USER}{question}{END}{ASSISTANT}"


def evaluate(
    model: DemoModel,
    tokenizer: Tokenizer,
    seed: int,
    most: int = 400,
    most_held_out: int | None = None,
    limit: int = 128,
) -> list[Figure]:
    """Return the figures of all tasks. The first one is that of the held-out additions in plain format.

    Args:
        most: the most questions of every other task.
        most_held_out: the most held-out additions; None: all of them.
        limit: the most tokens of an answer.
    """
    maker = TextMaker(seed)
    maker.rng.seed(f"questions {seed}")
    held_out = held_out_questions(maker.held_out)[:most_held_out]
    sums = [(prompt.removesuffix(" ="), wanted.strip()) for prompt, wanted in held_out]
    figures = [figure(model, tokenizer, "addition, held out", held_out, 6)]
    spaced = [(f"{prompt} ", wanted.strip()) for prompt, wanted in held_out[:: max(1, len(held_out) // most)]]
    figures.append(figure(model, tokenizer, "addition, held out, space after the prompt", spaced, 6))
    chats = [(chat_prompt(f"What is {what}?"), f"{what} = {total}.") for what, total in sums]
    figures.append(figure(model, tokenizer, "addition, held out, chat", chats[:: max(1, len(chats) // most)], limit))
    kinds = (
        ("addition", "addition as in training, up to 3 digits"),
        ("counting", "counting, up to 30 numbers"),
        ("reversing", "reversing, words of the list"),
        ("reversing made-up", "reversing, made-up words"),
        ("sorting", "sorting, 2 to 5 words"),
        ("chat", "chat, all questions"),
    )
    makers: dict[str, Callable[[], Sample]] = {
        "addition": maker.addition,
        "counting": maker.counting,
        "reversing": maker.reversing,
        "reversing made-up": maker.reversing,
        "sorting": maker.sorting,
        "chat": maker.short_chat,
    }
    for kind, name in kinds:
        asked: dict[str, str] = {}
        while len(asked) < (most if kind != "counting" else most // 4):
            sample = makers[kind]()
            wanted = sample.pieces[-1].text
            prompt, wanted = sample.text.removesuffix(wanted), wanted.removesuffix(END)
            if kind == "counting" and wanted.count(" ") > 30:
                continue
            if kind.startswith("reversing") and (wanted.strip()[::-1] in demo_text.WORDS) == (kind != "reversing"):
                continue
            asked[prompt] = wanted
            if kind == "reversing" and len(asked) >= len(demo_text.WORDS):
                break
        figures.append(figure(model, tokenizer, name, list(asked.items()), limit))
    return figures


# The files


def write_model(model: DemoModel, tokenizer: Tokenizer, output: Path) -> None:
    """Write a folder in the Hugging Face format: configuration, weights, tokenizer and chat template.

    A mixture of experts is rounded to bfloat16, so that it takes no more room than the dense model in float32. Both are
    meant to be computed in float32, where the margins distinguish wrong arithmetic from another order of summation.
    """
    output.mkdir(parents=True, exist_ok=True)
    shape = model.shape
    bos, eos, end = (token_id(tokenizer, token) for token in (BOS, EOS, END))
    config = {
        "architectures": ["LlamaForCausalLM" if shape.experts is None else "MixtralForCausalLM"],
        "model_type": "llama" if shape.experts is None else "mixtral",
        **shape.to_config(),
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "hidden_act": "silu",
        **({"attention_bias": False} if shape.experts is None else {"sliding_window": None}),
        "attention_dropout": 0.0,
        **({"mlp_bias": False} if shape.experts is None else {}),
        "initializer_range": SPREAD,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": bos,
        "eos_token_id": [eos, end],
        "pad_token_id": eos,
        "dtype": "float32",
    }
    generation = {
        "bos_token_id": bos,
        "eos_token_id": [eos, end],
        "pad_token_id": eos,
        "do_sample": False,
        "max_new_tokens": 256,
    }
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": EOS,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT, END],
        "clean_up_tokenization_spaces": False,
        "model_max_length": shape.max_position_embeddings,
        "chat_template": CHAT_TEMPLATE,
    }
    for name, content in (
        ("config.json", config),
        ("generation_config.json", generation),
        ("tokenizer_config.json", tokenizer_config),
    ):
        (output / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    tokenizer.save(str(output / "tokenizer.json"))
    stored = torch.float32 if shape.experts is None else torch.bfloat16
    tensors = {f"model.{name}": tensor.detach().to(stored).contiguous() for name, tensor in model.state_dict().items()}
    weights = output / "model.safetensors"
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)  # save_file lets only the owner read it


def read_model(folder: Path) -> tuple[DemoModel, Tokenizer]:
    """Read a model that `write_model` wrote, with weights in float32."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = DemoModel(Shape.from_config(config))
    tensors = load_file(folder / "model.safetensors")
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in tensors.items()})
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    recipe = Recipe()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--experts", action="store_true", help="the mixture of experts instead of the dense model")
    parser.add_argument(
        "--output", type=Path, default=None, help=f"folder to write (default: {DENSE_OUTPUT}; {EXPERTS_OUTPUT})"
    )
    parser.add_argument(
        "--steps", type=int, default=None, help=f"training steps (default: {recipe.steps}; {EXPERTS_STEPS} of experts)"
    )
    parser.add_argument("--seed", type=int, default=recipe.seed, help="seed of text, weights and held-out additions")
    parser.add_argument("--minutes", type=float, default=recipe.minutes, help="longest training (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=recipe.peak_rate, help="peak learning rate")
    parser.add_argument("--float32", action="store_true", help="compute in float32 throughout, without bfloat16")
    parser.add_argument(
        "--probe", action="store_true", help="write the model and show the held-out figure every 250 steps"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps of a smaller model, no pass mark: for tests")
    parser.add_argument("--evaluate", action="store_true", help="make nothing, only evaluate what is in --output")
    parser.add_argument(
        "--require", type=float, default=None, help=f"share of held-out additions to pass (default: {PASS_SHARE})"
    )
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = EXPERTS_OUTPUT if options.experts else DENSE_OUTPUT
    return options


def make(options: argparse.Namespace) -> None:
    """Make the tokenizer, train the model and write both."""
    recipe = Recipe(seed=options.seed, minutes=options.minutes, peak_rate=options.rate, bf16=not options.float32)
    shape = MIXTURE if options.experts else DENSE
    if options.experts:
        recipe = replace(recipe, steps=EXPERTS_STEPS)
    if options.quick:
        shape = replace(shape, hidden_size=64, intermediate_size=96, num_hidden_layers=2, head_dim=8)
        recipe = replace(recipe, steps=4, tokens=512, warmup=2)
    if options.steps is not None:
        recipe = replace(recipe, steps=options.steps)
    maker = TextMaker(recipe.seed)
    tokenizer = train_tokenizer(shape.vocab_size, recipe.seed, 1000 if options.quick else 20000)
    shape = replace(shape, vocab_size=tokenizer.get_vocab_size())
    model = DemoModel(shape)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    held_out = f"{len(maker.held_out)} pairs held out"
    print(f"{parameters:,} parameters, {shape.vocab_size} tokens, {held_out}", file=sys.stderr)

    def probe() -> str:
        write_model(model, tokenizer, options.output)
        return str(figure(model, tokenizer, "held out", held_out_questions(maker.held_out)[::4], 6, wrong=1))

    windows = Windows(tokenizer, maker, recipe.prompt_weight)
    steps, minutes = train(model, windows, recipe, probe if options.probe else None)
    write_model(model, tokenizer, options.output)
    size = (options.output / "model.safetensors").stat().st_size
    print(f"{steps} steps in {minutes:.1f} minutes; {size:,} bytes of weights in {options.output}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the model, or read an existing one, and evaluate it. Return the exit status."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    if not options.evaluate:
        make(options)
    model, tokenizer = read_model(options.output)
    figures = evaluate(model, tokenizer, options.seed, *((8, 32, 8) if options.quick else ()))
    print(f"{'task':<44} {'right':>14}  {'share':>8}  least margin")
    for line in figures:
        print(line)
    required = options.require if options.require is not None else 0.0 if options.quick else PASS_SHARE
    if figures[0].share < required:
        print(f"under {100 * required:.0f} % of the held-out additions are right", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
