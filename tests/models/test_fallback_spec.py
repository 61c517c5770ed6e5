"""Models that run through transformers' module: their specs, their cuts, and the reasons for refusing some."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.comm.local import LocalComm
from shoal.errors import CheckpointError, ConfigError
from shoal.kernels.reference import ReferenceKernels
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.loader import CheckpointWeights, DummyWeights
from shoal.models.implementation import implementation_of, params_of, read_model, shards_of
from shoal.models.manifest import Cut, check_shapes, weight_bytes
from shoal.models.spec import AttentionSpec, NormSpec, Unsupported
from shoal.models.transformers import read_spec
from shoal.models.transformers.cut_plan import logits_are_elementwise
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.models.transformers.model import build_transformers_model
from shoal.models.transformers.read_spec import read_fallback_spec
from shoal.models.transformers.trial import NotRunnable, materialize_buffers, window_of_mask
from shoal.parallel.mesh import Axis
from shoal.planner.memory import StepSize, rank_memory
from support import checkpoints, other_models

ONE = Axis("tp", 0, 1, LocalComm())
CPU = torch.device("cpu")


def config_of(name: str, kind: str = "ForCausalLM", **changes: Any) -> dict[str, Any]:
    """Return the config.json of a small model."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        **{**checkpoints.SIZES, **other_models.ALL.get(name, {}), **changes}
    )
    return {**json.loads(config.to_json_string(use_diff=False)), "architectures": [f"{name}{kind}"]}


def read(name: str, **changes: Any) -> FallbackSpec:
    return read_fallback_spec(config_of(name, **changes), "here")


def cut_of(spec: FallbackSpec, name: str) -> tuple[Cut, int]:
    (piece,) = next(param for param in spec.params if param.name == name).pieces
    return piece.cut, piece.dim


def test_sizes_and_attention_are_found_in_a_trial() -> None:
    spec = read("Cohere2")
    assert (spec.hidden_size, spec.num_layers, spec.num_heads, spec.num_kv_heads, spec.head_dim) == (64, 3, 8, 4, 8)
    assert (spec.vocab_size, spec.max_positions, spec.tie_embeddings, spec.dtype) == (301, 256, True, "float32")
    scale = 8**-0.5
    assert spec.attention == (AttentionSpec(scale, window=8), AttentionSpec(scale), AttentionSpec(scale, window=8))
    assert (spec.architecture, spec.backbone, spec.prefix) == ("Cohere2ForCausalLM", "model", "model.")


def test_scales_and_soft_caps_are_found() -> None:
    assert [each.scale for each in read("Granite").attention] == [0.2] * 3
    spec = read("VaultGemma", attn_logit_softcapping=30.0, query_pre_attn_scalar=64)
    assert [(each.scale, each.window, each.softcap) for each in spec.attention][:2] == [
        (0.125, 8, 30.0),
        (0.125, None, 30.0),
    ]


def test_a_tensor_parallel_plan_cuts_heads_columns_and_vocabulary() -> None:
    spec = read("Starcoder2")
    attention, mlp = "model.layers.1.self_attn", "model.layers.1.mlp"
    assert cut_of(spec, f"{attention}.q_proj.weight") == (Cut.Q_HEADS, 0)
    assert cut_of(spec, f"{attention}.v_proj.bias") == (Cut.KV_HEADS, 0)
    assert cut_of(spec, f"{attention}.o_proj.weight") == (Cut.Q_HEADS, 1)
    assert cut_of(spec, f"{attention}.o_proj.bias") == (Cut.WHOLE, 0)  # it is added after the sum over ranks
    assert cut_of(spec, f"{mlp}.c_fc.bias") == (Cut.MLP, 0)
    assert cut_of(spec, f"{mlp}.c_proj.weight") == (Cut.MLP, 1)
    assert cut_of(spec, "embedding") == cut_of(spec, "head") == (Cut.VOCAB, 0)
    assert cut_of(spec, "model.norm.weight") == (Cut.WHOLE, 0)
    assert (spec.cut_attention, spec.cut_linears, spec.uncut_reason) == (True, 3 * 6, "")
    assert "18 linear layers cut by its tensor-parallel plan" in spec.describe(2)
    assert spec.describe(1).endswith("on one rank")


@pytest.mark.parametrize("name", sorted(other_models.WHOLE_ATTENTION))
def test_attention_that_needs_all_heads_is_not_cut(name: str) -> None:
    """The plan of Olmo2 does not cut it. The plan of Cohere does, but a trial with fewer heads fails."""
    spec = read(name)
    assert (spec.cut_attention, spec.cut_linears) == (False, 3 * 3)
    assert "every rank computes all of its attention" in spec.describe(2)
    for shard in shards_of(spec, 3):
        assert (len(shard.heads.q_range), len(shard.heads.kv_ids)) == (8, 4)
        assert shard.heads.q_to_kv == (0, 0, 1, 1, 2, 2, 3, 3)
        assert len(shard.ranges[Cut.MLP]) < 112


def test_an_mlp_is_not_cut_if_the_plan_gathers_its_result() -> None:
    spec = read("Glm")
    assert (spec.cut_attention, spec.cut_linears) == (True, 3 * 4)
    assert spec.describe(2).endswith(
        "12 linear layers cut by its tensor-parallel plan; every rank computes all of its MLP"
    )
    assert [len(shard.ranges[Cut.MLP]) for shard in shards_of(spec, 2)] == [spec.intermediate_size] * 2


@pytest.mark.parametrize(
    ("name", "reason"),
    [("StableLm", "it publishes no tensor-parallel plan"), ("Phi3", "no layers cut by columns that are followed by")],
)
def test_a_model_without_a_usable_plan_runs_on_one_rank_only(name: str, reason: str) -> None:
    spec = read(name)
    assert len(shards_of(spec, 1)) == 1
    assert reason in spec.describe(1)
    with pytest.raises(ConfigError, match=f"--tensor-parallel-size 2: {name}ForCausalLM .*{reason}"):
        shards_of(spec, 2)


def test_two_ranks_take_half_the_memory_each() -> None:
    spec = read("Granite", hidden_size=256, intermediate_size=512)
    sizes: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": 16, "step": StepSize(64, 4)}
    (alone,), halves = (
        [rank_memory(spec, spec.params, shard, **sizes) for shard in shards_of(spec, ranks)] for ranks in (1, 2)
    )
    # Both ranks have all norms. Of the 301 rows of the vocabulary, one rank has 151 and the other 150.
    assert all(0.5 * alone.weights <= half.weights < 0.51 * alone.weights for half in halves)
    assert [half.block for half in halves] == [alone.block // 2] * 2


def test_the_manifest_names_exactly_the_tensors_of_the_checkpoint(tmp_path: Path) -> None:
    """The manifest also has the shapes, and an error names a missing tensor."""
    shapes = open_checkpoint(other_models.save("Starcoder2", tmp_path)).shapes
    spec = read_model(tmp_path, "auto")
    found = params_of(spec, shapes)
    check_shapes(found, shapes, "here")
    assert {piece.source for param in found for piece in param.pieces} == set(shapes)
    assert weight_bytes(spec, found, shards_of(spec, 1)[0], 4, embedding_kept=True) >= 4 * sum(
        torch.Size(shape).numel() for shape in shapes.values()
    )
    some = {name: shape for name, shape in shapes.items() if "layers.2.mlp.c_fc" not in name}
    with pytest.raises(CheckpointError, match=r"lacks the tensor model\.layers\.2\.mlp\.c_fc\.weight of shape"):
        check_shapes(params_of(spec, some), some, "here")


def test_tensor_names_may_lack_the_prefix() -> None:
    spec = read("Granite", tie_word_embeddings=False)
    assert isinstance(spec, FallbackSpec)
    written = [piece.source for param in spec.params for piece in param.pieces]
    bare = {name.removeprefix("model.") for name in written}
    assert {piece.source for param in params_of(spec, bare) for piece in param.pieces} == bare
    assert {piece.source for param in params_of(spec, written) for piece in param.pieces} == set(written)


def test_the_implementation_follows_the_option_and_the_architecture(tmp_path: Path) -> None:
    def folder(name: str) -> Path:
        (tmp_path / "config.json").write_text(json.dumps(config_of(name)))
        return tmp_path

    assert implementation_of(read_model(folder("Llama"), "auto")) == "shoal"
    forced = read_model(folder("Llama"), "transformers")
    assert (implementation_of(forced), forced.num_heads) == ("transformers", 8)
    assert implementation_of(read_model(folder("Olmo2"), "auto")) == "transformers"
    with pytest.raises(Unsupported, match="architecture Olmo2ForCausalLM is not supported"):
        read_model(folder("Olmo2"), "shoal")
    with pytest.raises(CheckpointError, match=r"is not supported.*; .*MambaForCausalLM can't run through") as caught:
        read_model(folder("Mamba"), "auto")
    assert "\n" not in str(caught.value)


REFUSED: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "no attention": (lambda: config_of("Mamba"), "no attention that transformers' AttentionInterface could replace"),
    "attention of its own": (lambda: config_of("Bloom"), "no attention that transformers' AttentionInterface"),
    "a table of its own": (lambda: config_of("GPTJ"), "no attention that transformers' AttentionInterface"),
    "sinks": (lambda: config_of("GraniteSWA"), "its attention takes s_aux, which ours does not support"),
    "heads of two sizes": (lambda: config_of("MiniCPM3"), r"its queries, keys and values have heads of .* dimensions"),
    "two calls a layer": (lambda: config_of("DiffLlama"), "its 3 layers call attention 6 times"),
    "no positions": (lambda: config_of("CTRL", "LMHeadModel"), "does not take the positions of tokens"),
    "both directions": (lambda: config_of("Bert", "LMHeadModel"), "neither causal nor a sliding window"),
    "packed experts": (lambda: config_of("Mixtral"), "rearranges its tensors while loading"),
    "an encoder": (lambda: config_of("Bart"), "it has an encoder"),
    "images": (lambda: {"architectures": ["X"], "text_config": {"hidden_size": 8}}, "it has a text_config"),
    "quantized": (lambda: config_of("Olmo2") | {"quantization_config": {"bits": 4}}, "its weights are quantized"),
    "recurrent layers": (
        lambda: config_of("Olmo2") | {"layer_types": ["full_attention", "linear_attention"]},
        "layers of type linear_attention need more than a KV cache",
    ),
    "rope by length": (
        lambda: config_of("Olmo2") | {"rope_scaling": {"type": "ntk", "factor": 2.0}, "rope_parameters": None},
        "rope scaling ntk depends on the longest sequence",
    ),
    "rope by layer type": (
        lambda: config_of("Olmo2") | {"rope_parameters": {"full_attention": {"rope_type": "longrope"}}},
        "rope scaling longrope depends",
    ),
    "code of its own": (
        lambda: {"architectures": ["Mine"], "model_type": "mine", "auto_map": {"AutoConfig": "mine.py--Mine"}},
        r"has code of its own \(auto_map\), which is never run",
    ),
    "unknown": (lambda: {"architectures": ["Mine"], "model_type": "mine"}, "does not know the model_type 'mine'"),
    "no model type": (lambda: {"architectures": ["Mine"]}, "does not know the model_type None"),
    "another class": (lambda: config_of("Olmo2") | {"architectures": ["Olmo3ForCausalLM"]}, "is Olmo2ForCausalLM in"),
    "no causal model": (lambda: config_of("ViT", "Model"), "it is not a causal language model"),
    "sizes that do not fit": (lambda: config_of("Olmo2") | {"num_attention_heads": "many"}, "a trial without weights"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_the_engine_can_not_run_are_refused_in_one_line(case: str) -> None:
    config, reason = REFUSED[case]
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_fallback_spec(config(), "here")
    assert str(caught.value).startswith("here: ")
    assert "\n" not in str(caught.value)


def test_code_in_the_model_folder_is_ignored_if_transformers_knows_the_model() -> None:
    config = config_of("Olmo2") | {"auto_map": {"AutoModelForCausalLM": "nowhere/else--modeling.Other"}}
    assert read_fallback_spec(config, "here").architecture == "Olmo2ForCausalLM"


@pytest.mark.parametrize("architectures", [None, []])
def test_the_model_type_decides_if_the_config_has_no_architecture(architectures: list[str] | None) -> None:
    """`config.save_pretrained` writes a config.json without architectures."""
    spec = read_fallback_spec(config_of("Olmo2") | {"architectures": architectures}, "here")
    assert spec == read("Olmo2")
    with pytest.raises(
        CheckpointError, match=r"here: an unnamed architecture can't run .* not know the model_type 'mine'"
    ):
        read_fallback_spec({"architectures": architectures, "model_type": "mine"}, "here")


@pytest.mark.parametrize("original", [{}, {"original_max_position_embeddings": 64}])
@pytest.mark.parametrize("factor", [0.5, 4.0])
def test_yarn_gives_the_same_number_of_positions_in_both_implementations(
    tmp_path: Path, factor: float, original: dict[str, Any]
) -> None:
    rope = {"rope_type": "yarn", "factor": factor, "rope_theta": 10000.0, **original}
    config = config_of("Llama") | {"rope_parameters": rope, "max_position_embeddings": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))
    lengths = [read_model(tmp_path, implementation).max_positions for implementation in ("shoal", "transformers")]
    expected = {(0.5, 0): 128, (0.5, 1): 128, (4.0, 0): 512, (4.0, 1): 256}[factor, len(original)]
    assert lengths == [expected] * 2


def test_without_transformers_the_error_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(path: str) -> Any:
        raise ImportError("No module named 'transformers'")

    monkeypatch.setattr(read_spec, "load", missing)
    with pytest.raises(CheckpointError, match="No module named 'transformers'; install transformers"):
        read_fallback_spec(config_of("Olmo2"), "here")


def causal(_b: Tensor, _h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


@pytest.mark.parametrize("window", [1, 2, 255, 256, 257, 4096, 131_071])
def test_the_window_of_a_mask_is_found(window: int) -> None:
    assert window_of_mask(lambda b, h, q, k: (k <= q) & (k > q - window)) == window


def test_a_causal_mask_has_no_window() -> None:
    assert window_of_mask(causal) is None


@pytest.mark.parametrize(
    "mask",
    [
        lambda b, h, q, k: k >= 0,
        lambda b, h, q, k: k < q,
        lambda b, h, q, k: (k <= q) & (k // 64 == q // 64),
        lambda b, h, q, k: (k <= q) & (k // 8192 == q // 8192),
        lambda b, h, q, k: (k <= q) & ((k < 4) | (q - k < 64)),
        lambda b, h, q, k: (k <= q) & ((q - k) % 2 == 0),
    ],
    ids=["all", "before", "chunks", "long chunks", "sinks", "every other"],
)
def test_other_masks_are_refused(mask: Any) -> None:
    with pytest.raises(NotRunnable, match="neither causal nor a sliding window"):
        window_of_mask(mask)


class Causal(nn.Module):
    """A causal model that applies `change` to its logits."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model = nn.Identity()
        self.lm_head = nn.Linear(4, 60, device="meta")
        self._change = change

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, inputs_embeds: Tensor, use_cache: bool) -> SimpleNamespace:
        hidden = self.model(inputs_embeds=inputs_embeds, use_cache=use_cache).last_hidden_state
        return SimpleNamespace(logits=self._change(self.lm_head(hidden)))


@pytest.mark.parametrize(
    ("change", "elementwise"),
    [
        (lambda x: x * 0.5, True),
        (lambda x: 30 * torch.tanh(x / 30), True),
        (lambda x: x.log_softmax(-1), False),
        (lambda x: x[..., :40], False),
        (lambda x: x + torch.arange(60), False),
    ],
    ids=["scaled", "capped", "normalized", "cropped", "biased"],
)
def test_logits_that_depend_on_each_other_are_recognized(change: Any, elementwise: bool) -> None:
    spec = FallbackSpec(
        "transformers", 4, 1, 1, 1, 4, 4, 60, 8, (AttentionSpec(1.0),), NormSpec("rms", 1e-6), False, "float32",
        backbone="model",
    )  # fmt: skip
    assert logits_are_elementwise(Causal(change), spec) is elementwise


def test_a_buffer_that_the_module_does_not_compute_is_named() -> None:
    class WithUncomputedBuffer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.empty(3, device="meta"), persistent=False)

        def initialize_weights(self) -> None:
            pass

    with pytest.raises(CheckpointError, match="WithUncomputedBuffer does not compute the values of its buffer table"):
        materialize_buffers(WithUncomputedBuffer(), CPU)


def test_every_tensor_of_a_loaded_model_has_numbers(tmp_path: Path) -> None:
    other_models.save("StableLm", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    spec = read_model(tmp_path, "auto")
    assert isinstance(spec, FallbackSpec)
    (shard,), checkpoint = shards_of(spec, 1), open_checkpoint(tmp_path)
    weights = CheckpointWeights(checkpoint, params_of(spec, checkpoint.shapes), shard, torch.float32)
    model = build_transformers_model(config, spec, shard, ONE, weights, ReferenceKernels(), CPU)
    tensors = [*model.backbone.named_parameters(), *model.backbone.named_buffers()]
    assert {"norm.weight", "rotary_emb.inv_freq"} <= {name for name, _ in tensors}
    for name, tensor in tensors:
        assert not tensor.is_meta, name
        assert bool(tensor.isfinite().all()), name
    assert not [module for module in model.backbone.modules() if type(module) is nn.Linear]


def test_a_model_may_have_dummy_weights() -> None:
    config = config_of("Glm")
    spec = read_fallback_spec(config, "here")
    (shard,) = shards_of(spec, 1)
    weights = DummyWeights(params_of(spec), shard, torch.float32, 0)
    model = build_transformers_model(config, spec, shard, ONE, weights, ReferenceKernels(), CPU)
    logits = model.logits(torch.ones(2, 64))
    assert (logits.shape, logits.dtype) == ((2, 301), torch.float32)
