"""What of a module of transformers is cut over ranks: what its tensor-parallel plan names and we know how to cut.

A plan gives linear layers a style. `colwise` layers that lead to `rowwise` ones are cut by heads or by inner columns,
and one sum over ranks follows the second. Where a plan gathers whole results between the two (`colwise_gather_output`,
for a norm over all heads, say), or packs several layers into one, or cuts experts, the layers stay whole on every rank.
"""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from shoal.models.manifest import Cut, Param, Piece, Shard, shards
from shoal.models.transformers.fallback_spec import FallbackSpec, as_cut

Cuts = dict[str, tuple[Cut, int]]  # path of a linear layer -> what it is cut along, and the dimension of its weight
Trial = Callable[[], list[tuple[int, int]]]  # runs the backbone; gives each layer's query and KV heads


class LinearModule(nn.Module):
    """One of our linear layers in the place of one of torch's: [..., in] to [..., out]."""

    def __init__(self, inner: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.inner(x.flatten(0, -2)).unflatten(0, x.shape[:-1])
        return out


class Given(nn.Module):
    """Takes a module's place where its outcome is known, and gives that back."""

    def forward(self, x: Tensor) -> Tensor:
        return x


class GivenBackbone(nn.Module):
    """Takes the backbone's place: its last hidden states are the embeddings that it is handed."""

    def forward(self, *_args: Any, inputs_embeds: Tensor, **_options: Any) -> "BackboneOutput":
        return BackboneOutput(inputs_embeds)


class BackboneOutput:
    """What a backbone gives, of which only the last hidden states are there."""

    def __init__(self, last_hidden_state: Tensor) -> None:
        self.last_hidden_state = last_hidden_state

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int) -> Tensor | None:
        return self.last_hidden_state if index == 0 else None


def place_of(spec: FallbackSpec, path: str) -> int | Literal["first", "last", "every"]:
    """Which pipeline stages have the tensor at a path."""
    if not spec.layers:
        return "every"
    if path.startswith(f"{spec.layers}."):
        return int(path.removeprefix(f"{spec.layers}.").split(".")[0])
    module = path.rpartition(".")[0]
    if module in dict(spec.before):
        return "first"
    return "last" if module in spec.behind or not path.startswith(f"{spec.backbone}.") else "every"


def path_of(model: nn.Module, module: nn.Module) -> str:
    paths: dict[nn.Module, str] = {each: name for name, each in model.named_modules()}
    return paths[module]


def put(model: nn.Module, path: str, module: nn.Module) -> None:
    """Sets the module at a path, in the place of the one that is there."""
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)


def set_context(model: nn.Module, context: Any) -> None:
    """Gives each module what its attention is to find with `context_of`.

    A module belongs to one rank, where what lies in a global would be shared by ranks that are threads; and not every
    model hands its layers what it was called with.
    """
    for module in model.modules():
        object.__setattr__(module, "shoal_context", context)


def context_of(module: nn.Module) -> Any:
    return vars(module)["shoal_context"]


@contextmanager
def swapped(model: nn.Module, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """Path -> module, for a while."""
    before = {path: model.get_submodule(path) for path in modules}
    try:
        for path, module in modules.items():
            put(model, path, module)
        yield
    finally:
        for path, module in before.items():
            put(model, path, module)


def with_manifest(spec: FallbackSpec, model: Any, trial: Trial) -> FallbackSpec:
    """The spec with every tensor, cut as far as the plan names it and as trials with cut layers pass."""
    plan = {path: str(style) for path, style in (model.tp_plan or {}).items()}
    body = {path: style for path, style in plan.items() if path.startswith(f"{spec.backbone}.")}
    if not body:
        return _with_cuts(spec, model, {}, "it publishes no tensor-parallel plan")
    if not logits_are_elementwise(model, spec):
        return _with_cuts(spec, model, {}, "what it does to its logits takes all of them")
    attention, mlp = _attention_cuts(spec, model, body), _mlp_cuts(model, body)
    problem = "its tensor-parallel plan has no layers cut by columns that lead to layers cut by rows"
    for cuts in ({**attention, **mlp} if attention else {}, mlp):
        if cuts:
            whole = [part for part, found in (("attention", attention), ("MLP", mlp)) if not found.keys() & cuts.keys()]
            note = f"its {' and '.join(whole)} is whole on every rank" if whole else ""
            found = _with_cuts(spec, model, cuts, note)
            try:
                _check_cut(found, model, trial)
            except Exception as error:  # noqa: BLE001 - foreign code that is tried out may raise anything
                problem = f"its cut layers do not fit together ({(str(error).splitlines() or ['no message'])[0]})"
                continue
            return found
    return _with_cuts(spec, model, {}, problem)


def _linears(model: nn.Module, plan: Mapping[str, str]) -> dict[str, dict[str, tuple[nn.Linear, str]]]:
    """Parent's path -> name of a linear layer in it -> the layer and its style in the plan."""
    found: dict[str, dict[str, tuple[nn.Linear, str]]] = defaultdict(dict)
    for path, module in model.named_modules():
        style = plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        if style is not None and type(module) is nn.Linear:
            parent, _, name = path.rpartition(".")
            found[parent][name] = (module, style)
    return found


def _attention_cuts(spec: FallbackSpec, model: nn.Module, plan: Mapping[str, str]) -> Cuts:
    """q, k and v by the heads that they make, the output by those it reads; nothing, unless every layer can be."""
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
    """Layers by columns that lead to layers by rows, where these have the commonest inner width."""
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
    """Every tensor of the module as a parameter: cut, if its layer is, and the embedding and the head by vocabulary."""
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
        if kind == "bias" and dim == 1:  # added to the sum over ranks
            cut, dim = Cut.WHOLE, 0
        name = names.get(path, path)
        if name in by_vocabulary:
            cut = Cut.VOCAB
        source = model.all_tied_weights_keys.get(path, path)
        params.append(Param(name, (Piece(source, tuple(tensor.shape), cut, dim),), at=place_of(spec, path)))
    inner = next((piece.shape[piece.dim] for param in params for piece in param.pieces if piece.cut is Cut.MLP), None)
    return dataclasses.replace(
        spec,
        params=tuple(params),
        paths=tuple((name, path) for path, name in names.items() if path in persistent),
        cut_attention=any(cut is Cut.Q_HEADS for cut, _ in cuts.values()),
        cut_linears=len(cuts),
        whole=note,
        intermediate_size=inner or spec.intermediate_size,
    )


def _check_cut(spec: FallbackSpec, model: Any, trial: Trial) -> None:
    """Runs the backbone as some ranks would have it: of two, and one of more than there are heads.

    Raises:
        Exception: whatever the module raises; ValueError: attention is called with other heads than the rank's.
    """
    some = [*_shards(spec, 2), *_shards(spec, spec.num_heads + 1)[-1:]]
    for shard in some:
        layers = {path: _shapes_only(spec, shard, pieces) for path, pieces in cut_layers(spec).items()}
        with swapped(model, layers):
            heads = trial()
        wanted = (max(len(shard.heads.q_range), 1), max(len(shard.heads.kv_ids), 1))
        if any(found != wanted for found in heads):
            raise ValueError(f"attention is called with {heads[0]} heads where a rank has {wanted}")


def _shards(spec: FallbackSpec, ranks: int) -> tuple[Shard, ...]:
    return as_cut(spec, shards(spec, ranks))


def cut_layers(spec: FallbackSpec) -> dict[str, Piece]:
    """Path of each linear layer that is cut, the head aside -> its weight."""
    return {
        param.name.removesuffix(".weight"): param.pieces[0]
        for param in spec.params
        if param.name.endswith(".weight") and param.pieces[0].cut not in (Cut.WHOLE, Cut.VOCAB)
    }


def _shapes_only(spec: FallbackSpec, shard: Shard, weight: Piece) -> LinearModule:
    out, wide = shard.shape(weight)
    if weight.cut is not Cut.MLP:  # a rank without heads computes one, and drops it
        out, wide = out or spec.head_dim, wide or spec.head_dim

    def inner(x: Tensor) -> Tensor:
        if x.shape[1] != wide:
            raise ValueError(f"a linear layer for {wide} inputs gets {x.shape[1]}")
        return x.new_empty(len(x), out)

    return LinearModule(inner)


@torch.inference_mode()
def logits_are_elementwise(model: Any, spec: FallbackSpec) -> bool:
    """Does a share of the logits come out as it does among all of them? Tried with a head that gives what it gets."""
    around = {spec.backbone: GivenBackbone(), path_of(model, model.get_output_embeddings()): Given()}
    logits = torch.linspace(30.0, -30.0, spec.vocab_size).view(1, 1, -1)
    share = slice(spec.vocab_size // 3, None)
    with swapped(model, around):
        try:
            whole = model(inputs_embeds=logits, use_cache=False).logits
            part = model(inputs_embeds=logits[..., share], use_cache=False).logits
        except Exception:  # noqa: BLE001 - it takes what is not there without weights, so it is no plain scaling
            return False
    return part.shape[-1] == logits[..., share].shape[-1] and bool(torch.equal(whole[..., share], part))
