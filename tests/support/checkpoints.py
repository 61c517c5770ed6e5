"""Small random checkpoints, made by transformers, in float32."""

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

MAKERS: dict[str, Callable[[], Any]] = {}


def _maker(make: Callable[[], Any]) -> Callable[[], Any]:
    MAKERS[make.__name__] = make
    return make


def _llama(**changes: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "intermediate_size": 112,
        "vocab_size": 301,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}))


@_maker
def llama() -> Any:
    """8 query and 4 KV heads; a vocabulary that no rank count divides."""
    return _llama()


@_maker
def llama3() -> Any:
    """Llama 3's rope scaling, tied embeddings, biases everywhere."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return _llama(rope_parameters=rope, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)


@_maker
def llama_6_2() -> Any:
    """6 query and 2 KV heads: over 3 ranks the middle one has halves of both groups."""
    return _llama(num_attention_heads=6, num_key_value_heads=2, head_dim=24, hidden_size=48, intermediate_size=90)


@_maker
def qwen3() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=100,
        vocab_size=259,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    )
    return Qwen3ForCausalLM(config)


def save(name: str, folder: Path, *, max_shard_size: str = "5GB") -> Path:
    """Writes the checkpoint `name`, the same at every call."""
    torch.manual_seed(0)
    model = MAKERS[name]().to(torch.float32).eval()
    # Random biases and norms: transformers makes them zeros and ones, which would hide a missing one.
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@lru_cache
def reference_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


class Reference:
    """transformers' greedy continuation of a prompt, with the logits behind each token."""

    def __init__(self, folder: Path) -> None:
        self.model = reference_model(folder)

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], steps: int) -> tuple[list[int], torch.Tensor]:
        """Tokens, and log-probabilities [steps, vocabulary]. EOS does not end it."""
        tokens, rows, past = torch.tensor([prompt]), [], None
        produced: list[int] = []
        for _ in range(steps):
            out = self.model(tokens, past_key_values=past, use_cache=True)
            past = out.past_key_values
            rows.append(out.logits[0, -1].float().log_softmax(-1))
            produced.append(int(rows[-1].argmax()))
            tokens = torch.tensor([[produced[-1]]])
        return produced, torch.stack(rows)

    @torch.inference_mode()
    def logprobs_of(self, prompt: Sequence[int], produced: Sequence[int]) -> torch.Tensor:
        """Log-probabilities [len(produced), vocabulary] when these tokens follow the prompt."""
        logits: torch.Tensor = self.model(torch.tensor([[*prompt, *produced]])).logits[0].float()
        return logits[len(prompt) - 1 : -1].log_softmax(-1)
