"""Cutting transformers modules into pipeline stages, and the reasons why some can't be cut."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.models.spec import AttentionSpec, NormSpec
from shoal.models.transformers.cut_plan import stage_of
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.models.transformers.stages import NotSplittable, ResidualStream, StageProbe, stand_ins
from shoal.parallel.stages import make_stages

LAYERS, HIDDEN, TOKENS = 3, 8, 5
SPEC = FallbackSpec(
    family="transformers",
    hidden_size=HIDDEN,
    num_layers=LAYERS,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    intermediate_size=8,
    vocab_size=16,
    max_positions=64,
    attention=(AttentionSpec(1.0),),
    norm=NormSpec("rms", 1e-6),
    tie_embeddings=False,
    dtype="float32",
    backbone="model",
)


class Layer(nn.Module):
    def __init__(self, number: int, *, in_tuple: bool) -> None:
        super().__init__()
        self.number = number
        self.in_tuple = in_tuple
        self.linear = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: Tensor, scale: Tensor | None = None) -> Any:
        out = hidden_states + self.linear(hidden_states if scale is None else hidden_states * scale)
        return (out, None) if self.in_tuple else out


class Backbone(nn.Module):
    """A backbone with tokens, positions and a norm. `run` calls its layers."""

    def __init__(self, run: Callable[["Backbone", Tensor, Tensor], Tensor], *, in_tuple: bool) -> None:
        super().__init__()
        self.tokens = nn.Embedding(16, HIDDEN)
        self.positions = nn.Embedding(64, HIDDEN)
        self.norm_in = nn.LayerNorm(HIDDEN)
        self.layers = nn.ModuleList(Layer(i, in_tuple=in_tuple) for i in range(LAYERS))
        self.norm = nn.LayerNorm(HIDDEN)
        self.never = nn.Linear(HIDDEN, HIDDEN)
        self._run = run

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.norm_in(self.tokens(input_ids) + self.positions(position_ids))
        norm: Tensor = self.norm(self._run(self, x, position_ids))
        return norm


def plain(backbone: Backbone, x: Tensor, _: Tensor) -> Tensor:
    for layer in backbone.layers:
        out = layer(x)
        x = out[0] if isinstance(out, tuple) else out
    return x


def model_of(run: Callable[[Backbone, Tensor, Tensor], Tensor] = plain, *, in_tuple: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.model = Backbone(run, in_tuple=in_tuple)
    model.head = nn.Linear(HIDDEN, 16)
    return model.eval()


def inputs() -> tuple[Tensor, Tensor]:
    return torch.arange(TOKENS).unsqueeze(0), torch.arange(3, 3 + TOKENS).unsqueeze(0)


@torch.no_grad()
def watched(model: nn.Module) -> FallbackSpec:
    backbone = model.get_submodule("model")
    watch, (tokens, positions) = StageProbe(model, backbone, LAYERS), inputs()
    with watch(tokens):
        backbone(tokens, positions)
    return watch.splittable_spec(SPEC)


@pytest.mark.parametrize("in_tuple", [False, True])
def test_the_cut_points_of_a_module_are_found_by_observing_a_run(*, in_tuple: bool) -> None:
    spec = watched(model_of(in_tuple=in_tuple))
    assert (spec.layers, spec.layers_give_tuples) == ("model.layers", in_tuple)
    assert spec.modules_before == (("model.tokens", HIDDEN), ("model.positions", HIDDEN), ("model.norm_in", HIDDEN))
    assert spec.modules_after == ("model.norm",)
    places = {
        "model.tokens.weight": "first",
        "model.norm_in.bias": "first",
        "model.layers.2.linear.weight": 2,
        "model.norm.weight": "last",
        "head.weight": "last",
        "model.never.weight": "every",
    }
    assert {path: stage_of(spec, path) for path in places} == places


@pytest.mark.parametrize("in_tuple", [False, True])
@pytest.mark.parametrize("cut", [(1, 1, 1), (2, 1), (1, 2), (3,)])
@torch.no_grad()
def test_all_stages_together_compute_the_same_as_the_module(cut: tuple[int, ...], *, in_tuple: bool) -> None:
    spec = watched(model_of(in_tuple=in_tuple))
    tokens, positions = inputs()
    expected = model_of(in_tuple=in_tuple).get_submodule("model")(tokens, positions)
    found = None
    for stage in make_stages(cut):
        model, stream = model_of(in_tuple=in_tuple), ResidualStream(found)
        for path, module in stand_ins(spec, model, stage, stream).items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, module)
        assert [path for path, _ in model.named_parameters() if "layers" in path and path.endswith("weight")] == [
            f"model.layers.{i}.linear.weight" for i in stage.layers
        ]
        assert [layer.number for layer in model.get_submodule("model.layers").children()] == list(range(LAYERS))
        out = model.get_submodule("model")(tokens if stage.first else torch.zeros_like(tokens), positions)
        found = out if stage.last else stream.left
    assert found is not None
    assert torch.equal(found, expected)


def scale_between_layers(backbone: Backbone, x: Tensor, _: Tensor) -> Tensor:
    for layer in backbone.layers:
        x = layer(x) * 1.5
    return x


def reuse_the_first_input(backbone: Backbone, x: Tensor, _: Tensor) -> Tensor:
    begin = x
    for layer in backbone.layers:
        x = layer(x, begin.mean())
    return x


def use_a_table_of_the_first_stage(backbone: Backbone, x: Tensor, positions: Tensor) -> Tensor:
    extra = backbone.positions(positions)
    for layer in backbone.layers:
        x = layer(x, extra)
    return x


def run_one_layer_twice(backbone: Backbone, x: Tensor, _: Tensor) -> Tensor:
    return plain(backbone, backbone.layers[0](x), _)


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (scale_between_layers, "it changes the residual stream between its layers"),
        (reuse_the_first_input, "its layers use other results of earlier stages than the residual stream"),
        (
            use_a_table_of_the_first_stage,
            "its layers use other results of earlier stages than the residual stream",
        ),
        (run_one_layer_twice, "its layers do not run one after the other"),
    ],
)
def test_a_module_that_cannot_be_cut_gives_the_reason(
    run: Callable[[Backbone, Tensor, Tensor], Tensor], why: str
) -> None:
    with pytest.raises(NotSplittable, match=f"^{why}$"):
        watched(model_of(run))


def test_tensors_that_depend_only_on_positions_are_computed_on_every_stage() -> None:
    def run(backbone: Backbone, x: Tensor, positions: Tensor) -> Tensor:
        angles = positions.unsqueeze(-1) * 0.1
        for layer in backbone.layers:
            x = layer(x, angles.cos())
        return x

    assert watched(model_of(run)).layers == "model.layers"


def test_layers_outside_one_list_are_refused() -> None:
    model = model_of()
    with pytest.raises(NotSplittable, match="its 4 layers are not in one list"):
        StageProbe(model, model.get_submodule("model"), 4)
