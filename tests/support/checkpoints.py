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


SIZES = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "intermediate_size": 112,
    "vocab_size": 301,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}


def _make(name: str, drop: Sequence[str] = (), **changes: Any) -> Any:
    """The causal model `name` of transformers, with the sizes above."""
    import transformers

    sizes = {key: value for key, value in {**SIZES, **changes}.items() if key not in drop}
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")(**sizes)
    head = "LMHeadModel" if name == "GPT2" else "ForCausalLM"
    return getattr(transformers, f"{name}{head}")(config)


@_maker
def llama() -> Any:
    """A llama with 8 query and 4 KV heads, and a vocabulary size that no number of ranks divides."""
    return _make("Llama", tie_word_embeddings=False)


@_maker
def llama3() -> Any:
    """A llama with the rope scaling of Llama 3, tied embeddings and biases everywhere."""
    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }
    return _make("Llama", rope_parameters=rope, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)


@_maker
def llama_6_2() -> Any:
    """A llama with 6 query and 2 KV heads. With 3 ranks the middle one has halves of both groups."""
    return _make(
        "Llama", num_attention_heads=6, num_key_value_heads=2, head_dim=24, hidden_size=48, intermediate_size=90
    )


@_maker
def llama_yarn() -> Any:
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
    return _make("Llama", rope_parameters=rope, head_dim=16)


@_maker
def mistral() -> Any:
    """A mistral with a window that is shorter than most prompts."""
    return _make("Mistral", sliding_window=8)


@_maker
def qwen2() -> Any:
    """A qwen2 whose second half of the layers has a window."""
    return _make(
        "Qwen2",
        num_hidden_layers=4,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
        tie_word_embeddings=True,
    )


@_maker
def qwen3() -> Any:
    return _make(
        "Qwen3", num_key_value_heads=2, head_dim=32, intermediate_size=100, vocab_size=259, tie_word_embeddings=True
    )


@_maker
def gemma() -> Any:
    """A gemma with one KV head."""
    return _make("Gemma", num_key_value_heads=1, head_dim=16)


@_maker
def gemma2() -> Any:
    """A gemma2 with soft caps that have an effect, and a window in every other layer."""
    return _make(
        "Gemma2",
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=8,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
    )


@_maker
def gemma3() -> Any:
    """A gemma3 with two layers that have a window and another rope, then one without, twice."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
    }
    kinds = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    return _make(
        "Gemma3",
        num_hidden_layers=6,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=8,
        layer_types=kinds,
        rope_parameters=rope,
    )


@_maker
def mixtral() -> Any:
    """A mixtral with a window and 5 experts, 3 for each token. No number of ranks divides the size of an expert."""
    return _make(
        "Mixtral", num_local_experts=5, num_experts_per_tok=3, intermediate_size=37, sliding_window=12, head_dim=16
    )


@_maker
def granitemoe() -> Any:
    """A granitemoe with factors of embedding, scores, sublayers and logits, and all experts in one tensor."""
    return _make(
        "GraniteMoe",
        num_local_experts=6,
        num_experts_per_tok=2,
        intermediate_size=44,
        embedding_multiplier=3.0,
        attention_multiplier=0.21,
        residual_multiplier=0.4,
        logits_scaling=2.5,
        tie_word_embeddings=True,
    )


@_maker
def qwen2_moe() -> Any:
    """A qwen2_moe with a dense layer between two mixtures, a shared expert with a gate, and unnormalized weights."""
    return _make(
        "Qwen2Moe",
        num_experts=7,
        num_experts_per_tok=3,
        moe_intermediate_size=26,
        shared_expert_intermediate_size=50,
        mlp_only_layers=[1],
        norm_topk_prob=False,
        num_key_value_heads=2,
    )


@_maker
def qwen3_moe() -> Any:
    """A qwen3_moe with many small experts in every other layer."""
    return _make(
        "Qwen3Moe",
        num_hidden_layers=4,
        num_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=18,
        decoder_sparse_step=2,
        norm_topk_prob=True,
        head_dim=24,
    )


_GPT2_SIZES = {"n_embd": 64, "n_layer": 3, "n_head": 8, "n_positions": 256}
_NOT_GPT2 = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "num_key_value_heads",
)


@_maker
def gpt2() -> Any:
    return _make("GPT2", drop=(*_NOT_GPT2, "intermediate_size"), scale_attn_by_inverse_layer_idx=True, **_GPT2_SIZES)


_NOT_OPT = ("intermediate_size", "num_key_value_heads")


@_maker
def opt() -> Any:
    return _make("OPT", drop=_NOT_OPT, ffn_dim=112, init_std=0.3)


@_maker
def opt_350m() -> Any:
    """An opt with norms after the sum, none at the end, and an embedding of another width."""
    return _make("OPT", drop=_NOT_OPT, ffn_dim=112, init_std=0.3, do_layer_norm_before=False, word_embed_proj_dim=40)


@_maker
def phi() -> Any:
    """A phi that rotates half of each head, and has a bias on the output head."""
    return _make("Phi")


@_maker
def phi_qk_norm() -> Any:
    """A phi with LayerNorms over query and key heads, and fewer KV heads than query heads."""
    return _make("Phi", qk_layernorm=True, num_key_value_heads=2)


@_maker
def phi3() -> Any:
    """A phi3 with queries, keys and values in one tensor, in unequal parts."""
    return _make("Phi3", sliding_window=12)


@_maker
def gpt_neox() -> Any:
    return _make("GPTNeoX", drop=("num_key_value_heads",), rope_parameters=_QUARTER, use_parallel_residual=True)


@_maker
def gpt_neox_serial() -> Any:
    return _make("GPTNeoX", drop=("num_key_value_heads",), rope_parameters=_QUARTER, use_parallel_residual=False)


_QUARTER = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}


_LATENT: dict[str, Any] = {
    "num_key_value_heads": 8,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
}


@_maker
def deepseek_v2() -> Any:
    """A deepseek_v2 with low-rank queries, values narrower than keys, groups of experts, and YaRN with a factor."""
    rope: dict[str, Any] = {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
    }
    groups: dict[str, Any] = {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2}
    return _make("DeepseekV2", **{**_LATENT, **groups, "rope_parameters": rope, "n_shared_experts": 2})


@_maker
def deepseek_v2_lite() -> Any:
    """A deepseek_v2 with full-rank queries of 6 heads, experts without groups, and biases."""
    sizes: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 48, "q_lora_rank": None}
    return _make("DeepseekV2", **{**_LATENT, **sizes, "attention_bias": True, "n_shared_experts": 1})


@_maker
def deepseek_v3() -> Any:
    """A deepseek_v3 with sigmoid scores, a correction bias, and groups that are chosen by their best two experts."""
    return _biased(_make("DeepseekV3", **{**_LATENT, "n_group": 4, "topk_group": 2, "num_nextn_predict_layers": 1}))


@_maker
def deepseek_v3_halves() -> Any:
    """A deepseek_v3 with 6 heads, rotation of halves, and weights that don't sum to one."""
    sizes: dict[str, Any] = {"num_attention_heads": 6, "num_key_value_heads": 6, "hidden_size": 48}
    changes = {"rope_interleave": False, "norm_topk_prob": False, "n_group": 2, "topk_group": 1}
    return _biased(_make("DeepseekV3", **{**_LATENT, **sizes, **changes}))


def _biased(model: Any) -> Any:
    """Set correction biases that change which experts are chosen."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(std=0.3)
    return model


def save(name: str, folder: Path, *, max_shard_size: str = "5GB") -> Path:
    """Write the checkpoint `name`, the same at every call."""
    return save_model(MAKERS[name], folder, max_shard_size=max_shard_size)


def save_model(make: Callable[[], Any], folder: Path, *, max_shard_size: str = "5GB") -> Path:
    torch.manual_seed(0)
    model = make().to(torch.float32).eval()
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

    # Eager attention, since other kinds ignore gemma2's soft cap. Eager experts, since others need multiples of 4.
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **plain).eval()


class Reference:
    """The greedy continuation of a prompt by transformers, with the log-probabilities after each token."""

    def __init__(self, folder: Path) -> None:
        self.model = reference_model(folder)

    @torch.inference_mode()
    def greedy(self, prompt: Sequence[int], steps: int) -> tuple[list[int], torch.Tensor]:
        """Return `steps` tokens, and log-probabilities [steps, vocabulary]. EOS does not end the output."""
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
        """Return the log-probabilities [len(produced), vocabulary] of tokens that follow the prompt."""
        logits: torch.Tensor = self.model(torch.tensor([[*prompt, *produced]])).logits[0].float()
        return logits[len(prompt) - 1 : -1].log_softmax(-1)
