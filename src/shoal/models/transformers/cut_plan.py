"""Cutting the linear layers of a transformers module over ranks, by the tensor-parallel plan that it publishes.

A plan gives linear layers a style. `colwise` layers followed by `rowwise` ones are cut by heads or by inner columns,
and a sum over ranks follows the second. If a plan gathers complete results between the two (`colwise_gather_output`,
for example for a norm over all heads), packs several layers into one, or cuts experts, every rank has whole layers.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shoal.models.manifest import Cut, Param, Piece, Shard, make_shards
from shoal.models.transformers.fallback_spec import FallbackSpec, shards_as_cut

Cuts = dict[
    str, tuple[Cut, int]
]  # path of a linear layer -> what it is cut by, and along which dimension of its weight
_ROUTERS = ("gate", "router")  # names of layers that choose experts, which are not quantized
Trial = Callable[[], list[tuple[int, int]]]  # runs the backbone; returns each layer's numbers of query and KV heads


class LinearModule(nn.Module):
    """A module around one of our linear layers, which replaces one of torch's: [..., in] to [..., out]."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return out


class PassThrough(nn.Module):
    """A module that returns its input. It replaces one whose output is given as the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class PassThroughBackbone(nn.Module):
    """A backbone that returns the embeddings it is given as its last hidden states."""

    def forward(self, *_args: Any, inputs_embeds: Tensor, **_options: Any) -> "BackboneOutput":
        return BackboneOutput(inputs_embeds)


class BackboneOutput:
    """The output of a backbone, with the last hidden states only; all other attributes are None."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


def stage_of(spec: FallbackSpec, path: str) -> int | Literal["first", "last", "every"]:
    """Return which pipeline stages have the tensor at a path: `Param.at`."""
    if not spec.layers:
        return "every"
    if path.startswith(f"{spec.layers}."):
        return int(path.removeprefix(f"{spec.layers}.").split(".")[0])
    module = path.rpartition(".")[0]
    if module in dict(spec.modules_before):
        return "first"
    return "last" if module in spec.modules_after or not path.startswith(f"{spec.backbone}.") else "every"


def path_of(model: nn.Module, module: nn.Module) -> str:
    paths: dict[nn.Module, str] = {each: name for name, each in model.named_modules()}
    return paths[module]


def set_module(model: nn.Module, path: str, module: nn.Module) -> None:
    """Replace the module at a path."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def set_context(model: nn.Module, context: Any) -> None:
    """Store `context` in each module of a model, where `context_of` finds it when attention is called.

    A global variable would be shared by ranks that are threads, and not every model passes the arguments of its call on
    to its layers.
    """
    for module in model.modules():
        object.__setattr__(module, "shoal_context", context)


def context_of(module: nn.Module) -> Any:
    return vars(module)["shoal_context"]


@contextmanager
def replaced_modules(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Replace the modules at these paths inside a `with` statement."""
    before = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            set_module(model, path, module)
        yield
    finally:
        for path, module in before.items():
            set_module(model, path, module)


def add_manifest(spec: FallbackSpec, model: Any, trial: Trial) -> FallbackSpec:
    """Return the spec with all tensors. They are cut by the plan, as far as trials with cut layers succeed.

    Args:
        trial: runs the backbone of `model`, as it is then.
    """
    plan = {path: str(style) for path, style in (model.tp_plan or {}).items()}
    body = {path: style for path, style in plan.items() if path.startswith(f"{spec.backbone}.")}
    if not body:
        return _with_cuts(spec, model, {}, "it publishes no tensor-parallel plan")
    if not logits_are_elementwise(model, spec):
        return _with_cuts(spec, model, {}, "its logits depend on each other, so no rank can compute a share of them")
    attention, mlp = _attention_cuts(spec, model, body), _mlp_cuts(model, body)
    problem = "its tensor-parallel plan has no layers cut by columns that are followed by layers cut by rows"
    for cuts in ({**attention, **mlp} if attention else {}, mlp):
        if cuts:
            whole = [part for part, found in (("attention", attention), ("MLP", mlp)) if not found.keys() & cuts.keys()]
            note = f"every rank computes all of its {' and '.join(whole)}" if whole else ""
            found = _with_cuts(spec, model, cuts, note)
            try:
                _check_cut(found, model, trial)
            except Exception as error:  # noqa: BLE001 - foreign code may raise anything
                problem = f"its cut layers do not fit together ({(str(error).splitlines() or ['no message'])[0]})"
                continue
            return found
    return _with_cuts(spec, model, {}, problem)


def _linears(model: nn.Module, plan: Mapping[str, str]) -> dict[str, dict[str, tuple[nn.Linear, str]]]:
    """Return the linear layers that a plan names, with their styles, by the path of the parent and then by name."""
    found: dict[str, dict[str, tuple[nn.Linear, str]]] = defaultdict(dict)
    for path, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        if style is not None and type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            found[parent][name] = (module, style)
    return found


def _attention_cuts(spec: FallbackSpec, model: nn.Module, plan: Mapping[str, str]) -> Cuts:
    """Return cuts by heads for the query, key, value and output layers; none, unless all layers can be cut so."""
    q, kv = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    made = {"q_proj": (q, Cut.Q_HEADS), "k_proj": (kv, Cut.KV_HEADS), "v_proj": (kv, Cut.KV_HEADS)}
    cuts: Cuts = {}
    for parent, layers in _linears(model, plan).items():
        out = [name for name, (layer, style) in layers.items() if style == "rowwise" and layer.in_features == q]
        by_heads = [
            name
            for name, (size, _) in made.items()
            if name in layers and layers[name][1] == "colwise" and layers[name][0].out_features == size
        ]
        if len(by_heads) == len(made) and len(out) == 1:
            cuts |= {f"{parent}.{name}": (cut, 0) for name, (_, cut) in made.items()}
            cuts[f"{parent}.{out[0]}"] = (Cut.Q_HEADS, 1)
    return cuts if len(cuts) == 4 * spec.num_layers else {}


def _mlp_cuts(model: nn.Module, plan: Mapping[str, str]) -> Cuts:
    """Return cuts of MLPs: layers by columns, and those after them by rows.

    Only MLPs with the most common inner width are cut.
    """
    found: dict[str, tuple[int, Cuts]] = {}
    for parent, layers in _linears(model, plan).items():
        columns = {name: layer.out_features for name, (layer, style) in layers.items() if style == "colwise"}
        rows = {name: layer.in_features for name, (layer, style) in layers.items() if style == "rowwise"}
        widths = {*columns.values(), *rows.values()}
        if columns and rows and len(widths) == 1 and "q_proj" not in layers:
            cuts = {f"{parent}.{name}": (Cut.MLP, 0) for name in columns}
            found[parent] = (widths.pop(), cuts | {f"{parent}.{name}": (Cut.MLP, 1) for name in rows})
    if not found:
        return {}
    width = Counter(width for width, _ in found.values()).most_common(1)[0][0]
    return {path: cut for each, cuts in found.values() if each == width for path, cut in cuts.items()}


def _with_cuts(spec: FallbackSpec, model: Any, cuts: Cuts, note: str) -> FallbackSpec:
    """Return the spec with each tensor of the module as a parameter, and these layers cut.

    Embedding and head are cut by vocabulary. `note` says why no more is cut.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    plain = type(embedding) is nn.Embedding and embedding.max_norm is None
    names = {f"{path_of(model, embedding)}.weight": "embedding", f"{path_of(model, head)}.weight": "head"}
    names[f"{path_of(model, head)}.bias"] = "head_bias"
    by_vocabulary = {"head", "head_bias"} | (
        {"embedding"} if plain and len(embedding.weight) == spec.vocab_size else set()
    )
    persistent = model.state_dict()
    params = []
    for path, tensor in persistent.items():
        if not tensor.is_floating_point():
            continue
        module, _, kind = path.rpartition(".")
        cut, dim = cuts.get(module, (Cut.WHOLE, 0))
        if kind == "bias" and dim == 1:  # this bias is added after the sum over ranks
            cut, dim = Cut.WHOLE, 0
        name = names.get(path, path)
        if name in by_vocabulary:
            cut = Cut.VOCAB
        source = model.all_tied_weights_keys.get(path, path)
        linear = type(model.get_submodule(module)) is nn.Linear and kind == "weight"
        params.append(
            Param(
                name,
                (Piece(source, tuple(tensor.shape), cut, dim),),
                at=stage_of(spec, path),
                quantizable=linear and module.rpartition(".")[2] not in _ROUTERS,
            )
        )
    inner = next((piece.shape[piece.dim] for param in params for piece in param.pieces if piece.cut is Cut.MLP), None)
    return dataclasses.replace(
        spec,
        params=tuple(params),
        paths=tuple((name, path) for path, name in names.items() if path in persistent),
        cut_attention=any(cut is Cut.Q_HEADS for cut, _ in cuts.values()),
        cut_linears=len(cuts),
        uncut_reason=note,
        intermediate_size=inner or spec.intermediate_size,
    )


def _check_cut(spec: FallbackSpec, model: Any, trial: Trial) -> None:
    """Run the backbone as several ranks would have it: each of two ranks, and a rank that has no heads.

    Raises:
        ValueError: attention is called with another number of heads than the rank has.
        Exception: any error that the module raises.
    """
    some = [*_shards(spec, 2), *_shards(spec, spec.num_heads + 1)[-1:]]
    for shard in some:
        layers = {path: _shapes_only(spec, shard, pieces) for path, pieces in cut_layers(spec).items()}
        with replaced_modules(model, layers):
            heads = trial()
        wanted = (max(len(shard.heads.q_range), 1), max(len(shard.heads.kv_ids), 1))
        if any(found != wanted for found in heads):
            raise ValueError(f"attention is called with {heads[0]} query and KV heads, but the rank has {wanted}")


def _shards(spec: FallbackSpec, ranks: int) -> tuple[Shard, ...]:
    return shards_as_cut(spec, make_shards(spec, ranks))


def cut_layers(spec: FallbackSpec) -> dict[str, Piece]:
    """Return the weight of each linear layer that is cut, except the head, by the layer's path."""
    return {
        param.name.removesuffix(".weight"): param.pieces[0]
        for param in spec.params
        if param.name.endswith(".weight") and param.pieces[0].cut not in (Cut.WHOLE, Cut.VOCAB)
    }


def _shapes_only(spec: FallbackSpec, shard: Shard, weight: Piece) -> LinearModule:
    """Return a layer that has the shapes of a rank's share of a linear layer, and computes nothing."""
    out, width = shard.shape(weight)
    if weight.cut is not Cut.MLP:  # a rank without heads computes one head, and drops the result
        out, width = out or spec.head_dim, width or spec.head_dim

    def inner(x: Tensor) -> Tensor:
        if x.shape[1] != width:
            raise ValueError(f"a linear layer for {width} inputs gets {x.shape[1]}")
        return x.new_empty(len(x), out)

    return LinearModule(inner)


@torch.inference_mode()
def logits_are_elementwise(model: Any, spec: FallbackSpec) -> bool:
    """Return whether a share of the logits is the same when it is computed alone as when all are.

    This is tried with a head that returns its input.
    """
    around = {spec.backbone: PassThroughBackbone(), path_of(model, model.get_output_embeddings()): PassThrough()}
    logits = torch.linspace(30.0, -30.0, spec.vocab_size).view(1, 1, -1)
    share = slice(spec.vocab_size // 3, None)
    with replaced_modules(model, around):
        try:
            whole = model(inputs_embeds=logits, use_cache=False).logits
            part = model(inputs_embeds=logits[..., share], use_cache=False).logits
        except Exception:  # noqa: BLE001 - foreign code may raise anything; a simple scaling of logits does not
            return False
    return part.shape[-1] == logits[..., share].shape[-1] and bool(torch.equal(whole[..., share], part))
