"""The decoder without an engine: its logits are those of transformers, for every family and number of ranks."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.comm.local import LocalComm
from shoal.comm.threads import ThreadComm, ThreadGroup
from shoal.kernels.base import PagedBatch
from shoal.kernels.bf16_linear import load_bf16
from shoal.kernels.select import make_kernels
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.loader import CheckpointWeights
from shoal.models.decoder import build_decoder
from shoal.models.manifest import Shard, check_shapes, make_manifest, make_shards
from shoal.models.registry import read_spec, tensor_names
from shoal.parallel.mesh import Axis
from shoal.worker.kv_cache import allocate
from support.checkpoints import MAKERS, reference_model

# In another order of summation, logits of 5 to 16 change by at most 4e-5 in float32. A missing bias changes them by
# tenths.
TOLERANCE = 2e-4
# The prompts are shorter than all windows, as long as some of them, and longer than all.
LENGTHS = (2, 9, 70)
PROMPTS = [[(7 * i * i + 3 * i) % 251 + 3 for i in range(length)] for length in LENGTHS]
BLOCK_SIZE, BLOCKS = 16, 5  # blocks per sequence


@lru_cache
def expected(folder: Path) -> list[Tensor]:
    """Return the logits of each prompt from transformers: [tokens, vocabulary]."""
    model = reference_model(folder)
    with torch.inference_mode():
        return [model(torch.tensor([prompt])).logits[0].float() for prompt in PROMPTS]


def make_batch(starts: Sequence[int], stops: Sequence[int]) -> PagedBatch:
    """Return a batch with the tokens [start, stop) of each sequence."""
    lengths = [stop - start for start, stop in zip(starts, stops, strict=True)]
    tables = torch.arange(len(starts) * BLOCKS, dtype=torch.int32).view(len(starts), BLOCKS).flip(0, 1)
    positions = torch.cat([torch.arange(start, stop) for start, stop in zip(starts, stops, strict=True)])
    rows = torch.repeat_interleave(torch.arange(len(starts)), torch.tensor(lengths))
    return PagedBatch(
        positions=positions,
        slots=tables[rows, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE,
        query_starts=torch.tensor([0, *lengths]).cumsum(0).to(torch.int32),
        context_lens=torch.tensor(stops, dtype=torch.int32),
        block_tables=tables,
        block_size=BLOCK_SIZE,
        num_single=lengths.count(1),
        query_lens=tuple(lengths),
        host_context_lens=tuple(stops),
    )


@torch.inference_mode()
def logits_of_rank(folder: Path, shard: Shard, tp: Axis) -> list[Tensor]:
    """Return one rank's share of the logits of each prompt. The last token of each is computed in a second step."""
    spec, checkpoint = read_spec(folder), open_checkpoint(folder)
    params = make_manifest(spec, tensor_names(spec, checkpoint.shapes))
    check_shapes(params, checkpoint.shapes, str(folder))
    kernels, _ = make_kernels("cpu", torch.float32)
    weights = CheckpointWeights(checkpoint, params, shard, torch.float32)
    decoder = build_decoder(spec, shard, tp, weights, kernels, torch.device("cpu"), spec.max_positions)
    blocks = len(PROMPTS) * BLOCKS
    caches = allocate(spec, shard, blocks, BLOCK_SIZE, "float32", torch.device("cpu")).layers
    parts: list[list[Tensor]] = [[] for _ in PROMPTS]
    before_last = [length - 1 for length in LENGTHS]
    for starts, stops in (([0] * len(PROMPTS), before_last), (before_last, LENGTHS)):
        tokens = [token for i, prompt in enumerate(PROMPTS) for token in prompt[starts[i] : stops[i]]]
        hidden = decoder.hidden(torch.tensor(tokens), make_batch(starts, stops), caches, None)
        rows = decoder.logits(hidden).split([stop - start for start, stop in zip(starts, stops, strict=True)])
        for part, found in zip(parts, rows, strict=True):
            part.append(found)
    return [torch.cat(part) for part in parts]


def logits(folder: Path, weights: Sequence[int]) -> list[Tensor]:
    """Return the logits of each prompt from ranks in threads, whose shares are in proportion to `weights`."""
    tp = len(weights)
    group = ThreadGroup(tp, timeout_s=60)

    def rank(shard: Shard) -> list[Tensor]:
        comm = ThreadComm(group, shard.rank) if tp > 1 else LocalComm()
        try:
            return logits_of_rank(folder, shard, Axis("tp", shard.rank, tp, comm))
        except BaseException:
            group.abort()
            raise

    with ThreadPoolExecutor(tp) as pool:
        found = list(pool.map(rank, make_shards(read_spec(folder), tp, weights)))
    return [torch.cat(shares, dim=1) for shares in zip(*found, strict=True)]


def assert_close(folder: Path, found: Sequence[Tensor]) -> None:
    for ours, theirs in zip(found, expected(folder), strict=True):
        assert float((ours - theirs).abs().max()) < TOLERANCE


# More ranks than heads, so that some have none: one model of each kind of attention and of MLP in a default run.
MANY = (3, 1, 1, 9, 1, 1, 1, 1, 1, 1)
ON_MANY = ("deepseek_v2", "gemma3", "gpt2", "llama_6_2", "opt_350m", "phi3", "qwen3_moe")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give every model to one rank, and to three of which one has heads of two groups."""
    if "weights" in metafunc.fixturenames:
        many = MAKERS if metafunc.config.getoption("--matrix") else ON_MANY
        cases = [(name, weights) for name in sorted(MAKERS) for weights in ((1,), (1, 2, 1))]
        metafunc.parametrize(("name", "weights"), [*cases, *((name, MANY) for name in sorted(many))])


def test_logits_are_those_of_transformers(
    checkpoint: Callable[[str], Path], name: str, weights: tuple[int, ...]
) -> None:
    folder = checkpoint(name)
    assert_close(folder, logits(folder, weights))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mistral", {"sliding_window": 7}),
        ("qwen2", {"layer_types": ["full_attention"] * 3 + ["sliding_attention"]}),
        ("gemma2", {"attn_logit_softcapping": 4.0}),
        ("gemma2", {"query_pre_attn_scalar": 16}),
        ("gemma3", {"rope_parameters": {"sliding_attention": {"rope_theta": 10000.0}}}),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": False}),
        ("gpt2", {"activation_function": "gelu"}),
        ("opt", {"activation_function": "gelu"}),
        ("phi", {"rope_parameters": {"partial_rotary_factor": 0.25}}),
        ("llama_yarn", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}),
        ("gpt_neox", {"use_parallel_residual": False}),
        ("mixtral", {"num_experts_per_tok": 2}),
        ("mixtral", {"sliding_window": 7}),
        ("granitemoe", {"num_experts_per_tok": 3}),
        ("granitemoe", {"embedding_multiplier": 2.0}),
        ("granitemoe", {"attention_multiplier": 0.3}),
        ("granitemoe", {"residual_multiplier": 0.5}),
        ("granitemoe", {"logits_scaling": 2.0}),
        ("qwen2_moe", {"num_experts_per_tok": 4}),
        ("qwen2_moe", {"norm_topk_prob": True}),
        ("qwen3_moe", {"norm_topk_prob": False}),
    ],
)
def test_every_option_of_the_checkpoints_changes_the_logits(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, change: dict[str, object]
) -> None:
    """This shows that the test above would fail if the decoder ignored the option."""
    folder = checkpoint(name)
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(AssertionError):
        assert_close(folder, logits(tmp_path, (1,)))


STACKED = {
    "mixtral": ("block_sparse_moe.gate.weight", "mlp.gate.weight", "mlp.experts"),
    "qwen2_moe": ("mlp.gate.weight", "mlp.gate.weight", "mlp.experts"),
    "qwen3_moe": ("mlp.gate.weight", "mlp.gate.weight", "mlp.experts"),
    "granitemoe": (
        "block_sparse_moe.router.layer.weight",
        "block_sparse_moe.router.weight",
        "block_sparse_moe.experts",
    ),
}


@pytest.mark.parametrize("name", STACKED)
def test_logits_are_right_with_all_experts_in_one_tensor(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    """Transformers keeps all experts in one tensor, and some files have this form."""
    folder = checkpoint(name)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    before, after, experts = STACKED[name]
    tensors = {
        key.replace(before, after): tensor
        for key, tensor in load_file(folder / "model.safetensors").items()
        if "experts." not in key and "_linear" not in key
    }
    for i, layer in enumerate(reference_model(folder).model.layers):
        mixture = layer.block_sparse_moe if name == "granitemoe" else layer.mlp
        if hasattr(mixture, "experts"):
            tensors[f"model.layers.{i}.{experts}.gate_up_proj"] = mixture.experts.gate_up_proj.detach().clone()
            tensors[f"model.layers.{i}.{experts}.down_proj"] = mixture.experts.down_proj.detach().clone()
    save_file(tensors, tmp_path / "model.safetensors")
    for weights in ((1,), (1, 2, 1)):
        for ours, theirs in zip(logits(tmp_path, weights), expected(folder), strict=True):
            assert float((ours - theirs).abs().max()) < TOLERANCE


@pytest.mark.parametrize(
    ("name", "prefix", "other"),
    [
        ("gpt2", "transformer.", ""),
        ("opt", "model.decoder.", "decoder."),
        ("llama", "model.", ""),
        ("llama", "model.", "language_model.model."),
        ("gpt_neox", "gpt_neox.", ""),
        ("gpt_neox", "embed_out.", "lm_head."),
    ],
)
def test_logits_are_right_if_names_have_another_prefix(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, prefix: str, other: str
) -> None:
    """Some files on the hub have other prefixes and unneeded tensors, such as a tied head."""
    folder = checkpoint(name)
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    tensors = load_file(folder / "model.safetensors")
    renamed = {other + key.removeprefix(prefix) if key.startswith(prefix) else key: t for key, t in tensors.items()}
    assert renamed.keys() != tensors.keys()
    if read_spec(folder).tie_embeddings:
        renamed["lm_head.weight"] = torch.zeros(3)
    save_file({**renamed, "h.0.attn.masked_bias": torch.zeros(1)}, tmp_path / "model.safetensors")
    for ours, theirs in zip(logits(tmp_path, (1,)), expected(folder), strict=True):
        assert float((ours - theirs).abs().max()) < TOLERANCE


@pytest.mark.skipif(load_bf16()[0] is None, reason=load_bf16()[1])
@pytest.mark.parametrize(("name", "gives"), [("llama", True), ("gemma2", False)])
def test_a_head_in_bfloat16_gives_top_tokens_unless_its_logits_are_changed(
    checkpoint: Callable[[str], Path], name: str, gives: bool
) -> None:
    """The logits of gemma2 have a softcap."""
    folder = checkpoint(name)
    spec, stored = read_spec(folder), open_checkpoint(folder)
    shard = make_shards(spec, 1, [1])[0]
    weights = CheckpointWeights(stored, make_manifest(spec, tensor_names(spec, stored.shapes)), shard, torch.bfloat16)
    kernels, _ = make_kernels("cpu", torch.bfloat16)
    alone = Axis("tp", 0, 1, LocalComm())
    decoder = build_decoder(spec, shard, alone, weights, kernels, torch.device("cpu"), spec.max_positions)
    hidden = torch.randn(5, spec.hidden_size, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = decoder.top_tokens(hidden, 3)
    assert (found is not None) == gives
    if found is not None:
        values, ids = decoder.logits(hidden).float().max(1)
        assert torch.equal(found[0], values)
        assert torch.equal(found[1], ids + 3)
