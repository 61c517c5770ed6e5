"""What a module of transformers is, found out by building it without weights and running it without numbers.

Tensors on PyTorch's meta device have shapes and no data, so a model of any size is built and run in moments. Our
stand-in for attention writes down how each layer calls it; what the engine's attention could not do is refused.
"""

import dataclasses
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from shoal.errors import CheckpointError
from shoal.lazy import load
from shoal.models.fields import dtype_name
from shoal.models.rope_fields import stretched
from shoal.models.spec import AttentionSpec, NormSpec
from shoal.models.transformers.cut_plan import GivenBackbone, context_of, path_of, set_context, swapped, with_manifest
from shoal.models.transformers.fallback_spec import FallbackSpec, refusal
from shoal.models.transformers.stages import OneStage, Watch, check_stages

TRIAL = "shoal_trial"  # our stand-in's name among transformers' attention functions
_TOKENS = 6
# Attention may be handed these beside what the stand-in takes by name; they change no score.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "layer_idx"}
_SAMPLED_QUERIES = (0, 1, 63, 64, 1_000, 8_191, 8_192, 70_000, 131_071)  # positions at which a mask is looked at
_STRIDE = 256  # between the keys of a mask that are looked at first
_NO_INTERFACE = "it has no attention that transformers' AttentionInterface could replace"
_building = threading.Lock()  # building sets PyTorch's default dtype for a moment, and ranks may be threads


class Unfit(Exception):
    """Why the engine can't run a module: the end of a sentence."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """How a layer called attention."""

    layer: int | None
    q_heads: int
    kv_heads: int
    head_dim: int
    spec: AttentionSpec


def inspect(config: Mapping[str, Any], architecture: str, where: str) -> FallbackSpec:
    """Raises:
    CheckpointError: the engine can't run this model; it says why.
    """
    try:
        return _inspect(json.dumps(config, sort_keys=True), architecture)
    except Unfit as error:
        raise refusal(where, architecture, str(error)) from None
    except CheckpointError:
        raise
    except KeyError as error:
        reason = _NO_INTERFACE if error.args == (TRIAL,) else f"a trial without weights ended in KeyError: {error}"
        raise refusal(where, architecture, reason) from None
    except Exception as error:  # noqa: BLE001 - foreign code that is tried out may raise anything
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise refusal(
            where, architecture, f"a trial without weights ended in {type(error).__name__}: {first}"
        ) from None


def build(config: Mapping[str, Any], architecture: str, attention: str) -> Any:
    """The module, all of it on the meta device, in float32. `architecture` is its class; "": whichever it is.

    Raises:
        Unfit: transformers does not know the model, or not as a causal one.
    """
    kinds = load("transformers:CONFIG_MAPPING")
    kind = config.get("model_type")
    if kind not in kinds:
        own = "it brings code of its own (auto_map), which is never run, and " if config.get("auto_map") else ""
        raise Unfit(f"{own}the installed transformers knows no model_type {kind!r}")
    auto = load("transformers:AutoModelForCausalLM")
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "dtype", "torch_dtype")}
    if kind == "mistral" and "layer_types" in plain:  # as AutoConfig does
        kind, architecture = "ministral", architecture.replace("Mistral", "Ministral")
    with _building, torch.device("meta"):
        try:
            read = _steady(kinds[kind].from_dict(plain))
            model = auto.from_config(read, attn_implementation=attention, dtype=torch.float32)
        except ValueError as error:
            if "Unrecognized configuration class" in str(error):
                raise Unfit("it is no causal language model") from None
            raise
    if architecture and type(model).__name__ != architecture:
        raise Unfit(f"model_type {kind!r} is {type(model).__name__} in transformers, not {architecture}")
    return model.eval()


def _ropes(config: Any) -> list[dict[str, Any]]:
    """What a configuration says of ropes, some by layer type, as transformers has read it."""
    found = getattr(config, "rope_parameters", None) or {}
    return [value for value in found.values() if isinstance(value, dict)] or [found]


def _steady(config: Any) -> Any:
    """Dynamic scaling is none up to the length that the engine allows, and then looks at no token's position."""
    for rope in _ropes(config):
        if rope.get("rope_type") == "dynamic":
            rope["rope_type"] = "default"
    return config


@lru_cache(maxsize=8)  # ranks that are threads of one process ask for the same model
def _inspect(text: str, architecture: str) -> FallbackSpec:
    config: dict[str, Any] = json.loads(text)
    _register()
    model = build(config, architecture, TRIAL)
    if load("transformers.conversion_mapping:extract_weight_conversions_for_model")(model):
        raise Unfit("transformers rearranges its checkpoint's tensors when it loads them, which is not done here")
    model.to(torch.bfloat16)  # some operations have no shape rule for float32
    backbone = model.get_decoder()
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise Unfit(f"its head is {type(head).__name__}, not one linear layer")
    calls, hidden = _try(backbone)
    _try_head(model, backbone, hidden)
    layers = _layers(calls, model.config)
    longest, stretched_by = _max_positions(model.config)
    spec = FallbackSpec(
        family="transformers",
        hidden_size=hidden,
        num_layers=len(layers),
        num_heads=layers[0].q_heads,
        num_kv_heads=layers[0].kv_heads,
        head_dim=layers[0].head_dim,
        intermediate_size=_widest(backbone),
        vocab_size=head.out_features,
        max_positions=longest,
        stretched_by=stretched_by,
        attention=tuple(layer.spec for layer in layers),
        norm=NormSpec("rms", 1e-6),
        tie_embeddings=_tied(model) is not None,
        dtype=dtype_name(config),
        steady_positions=_steady_positions(config, model.config),
        architecture=type(model).__name__,
        backbone=path_of(model, backbone),
        prefix=f"{model.base_model_prefix}." if model.base_model is not model else "",
    )
    spec = _with_stages(spec, model, backbone)
    return with_manifest(spec, model, lambda: [(call.q_heads, call.kv_heads) for call in _try(backbone)[0]])


# Attention, as it is called.


@cache
def _register() -> None:
    load("transformers:AttentionInterface").register(TRIAL, _stand_in)
    load("transformers:AttentionMaskInterface").register(TRIAL, _mask)


class _Mask:
    """In the place of a mask, the function that would make it."""

    def __init__(self, sees: Callable[..., Any]) -> None:
        self._sees = sees

    @cached_property
    def window(self) -> int | None:
        return window_of(self._sees)


def _mask(q_length: int, kv_length: int, mask_function: Callable[..., Any], **_: Any) -> Tensor:
    mask = torch.empty(1, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask.shoal_mask = _Mask(mask_function)  # type: ignore[attr-defined]
    return mask


def _stand_in(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,  # says again what the mask says
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """query: [1, q_heads, n, d]; key, value: [1, kv_heads, n, d]. Gives [1, n, q_heads, d]."""
    mask = getattr(attention_mask, "shoal_mask", None)
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if unknown:
        raise Unfit(f"its attention takes {', '.join(unknown)}, which ours does not know")
    if mask is None or is_causal is False:
        raise Unfit("it makes attention masks of its own")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise Unfit(
            f"its queries, keys and values have heads of {query.shape[-1]}, {key.shape[-1]} and {value.shape[-1]} "
            "dimensions, and the KV cache needs equal ones"
        )
    if dropout or not isinstance(scaling, float | int | None) or not isinstance(softcap, float | int | None):
        raise Unfit("its attention has dropout, or scores that are scaled by more than a number")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    spec = AttentionSpec(scale, None, mask.window, None if softcap is None else float(softcap))
    context_of(module).append(
        AttentionCall(getattr(module, "layer_idx", None), query.shape[1], key.shape[1], query.shape[-1], spec)
    )
    return query.transpose(1, 2).contiguous(), None


def window_of(sees: Callable[..., Any]) -> int | None:
    """How far back a mask lets a query see; None: to the beginning.

    The last of some queries is searched for the first key that it sees; all of them are held against the result.

    Raises:
        Unfit: it is no window that ends at the query.
    """

    def seen(q: int, keys: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int64)
        return torch.as_tensor(sees(zero, zero, torch.tensor(q), keys)).expand(len(keys))

    with torch.device("cpu"):
        last = _SAMPLED_QUERIES[-1]
        coarse = torch.arange(0, last + 1, _STRIDE)
        first = _STRIDE * int(seen(last, coarse).logical_not().sum())  # keys before its window, rounded up
        window = last + 1 - first + int(seen(last, torch.arange(max(first - _STRIDE, 0), first)).sum())
        for q in _SAMPLED_QUERIES:
            ends = torch.tensor([q - 1, q, q + 1, q - window, q - window + 1])
            keys = torch.cat((coarse, ends[(ends >= 0) & (ends <= last)]))
            if not torch.equal(seen(q, keys), (keys <= q) & (keys > q - window)):
                raise Unfit("what a token sees is neither all before it nor a window of the tokens just before it")
    return None if window > last else window


class _Reads(TorchFunctionMode):
    """Notes whether a tensor is used by any operation."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            self.seen = self.seen or any(each is self.tensor for each in (*args, *given.values()))
        return func(*args, **given)


@dataclass(frozen=True, slots=True)
class _TrialRun:
    """Of a backbone."""

    calls: list[AttentionCall]  # of attention
    hidden: Tensor  # what it gives
    reads_positions: bool


@torch.inference_mode()
def _run(backbone: nn.Module, watch: Callable[[Tensor], AbstractContextManager[None]] | None = None) -> _TrialRun:
    """A forward pass, while `watch`, if there is one, looks at what becomes of the tokens."""
    calls: list[AttentionCall] = []
    shape = (1, _TOKENS)
    with torch.device("meta"):
        tokens, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        all_there = torch.ones(shape, dtype=torch.int64)
        with _Reads(positions) as reads, watch(tokens) if watch else nullcontext():
            set_context(backbone, calls)
            out = backbone(input_ids=tokens, position_ids=positions, attention_mask=all_there, use_cache=False)
    return _TrialRun(calls, out[0], reads.seen)


def _try(
    backbone: nn.Module, watch: Callable[[Tensor], AbstractContextManager[None]] | None = None
) -> tuple[list[AttentionCall], int]:
    """The calls of attention in a forward pass, and the hidden size."""
    run = _run(backbone, watch)
    if not run.calls:
        raise Unfit(_NO_INTERFACE)
    if not run.reads_positions:
        raise Unfit("it does not take the positions of tokens (position_ids)")
    if run.hidden.shape[:2] != (1, _TOKENS):
        raise Unfit("it does not give one hidden state a token")
    return run.calls, run.hidden.shape[-1]


def _with_stages(spec: FallbackSpec, model: Any, backbone: nn.Module) -> FallbackSpec:
    """The spec, with where it can be cut into pipeline stages, or why it can't."""
    try:
        watch = Watch(model, backbone, spec.num_layers)
        _run(backbone, watch)
        found = watch.found(spec)
        check_stages(found, model, _TOKENS, lambda: [call.layer for call in _run(backbone).calls])
    except OneStage as error:
        return dataclasses.replace(spec, one_stage=str(error))
    except Exception as error:  # noqa: BLE001 - foreign code that is tried out may raise anything
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return dataclasses.replace(spec, one_stage=f"a trial of a stage ended in {type(error).__name__}: {first}")
    return found


@torch.inference_mode()
def _try_head(model: Any, backbone: nn.Module, hidden: int) -> None:
    """Runs what the causal model does after its backbone.

    Raises:
        Unfit: it does not make the head's logits of the hidden states.
    """
    given = torch.empty(1, _TOKENS, hidden, dtype=torch.bfloat16, device="meta")
    with swapped(model, {path_of(model, backbone): GivenBackbone()}):
        logits = model(inputs_embeds=given, use_cache=False).logits
    if logits.shape != (1, _TOKENS, model.get_output_embeddings().out_features):
        raise Unfit(f"its logits have the shape {list(logits.shape)}")


def _layers(calls: Sequence[AttentionCall], config: Any) -> list[AttentionCall]:
    """The calls, one a layer.

    Raises:
        Unfit: layers without attention or with two, or of different shapes.
    """
    count = getattr(config, "num_hidden_layers", len(calls))
    if [call.layer for call in calls] != list(range(count)):
        raise Unfit(f"its {count} layers call attention {len(calls)} times: not once each, in order")
    shapes = {(call.q_heads, call.kv_heads, call.head_dim) for call in calls}
    if len(shapes) > 1:
        raise Unfit(f"its layers have attention heads of {len(shapes)} shapes")
    if calls[0].q_heads % calls[0].kv_heads:
        raise Unfit(f"{calls[0].q_heads} attention heads are no multiple of {calls[0].kv_heads} KV heads")
    return list(calls)


# Sizes and names.


def _max_positions(config: Any) -> tuple[int, str]:
    """How long texts may be, and what made more of them than config.json names."""
    for name in ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_ctx"):
        said = getattr(config, name, None)
        if isinstance(said, int) and said > 0:
            return max((_stretched(rope, said) for rope in _ropes(config)), key=lambda found: found[0])
    raise Unfit("its config.json names no max_position_embeddings")


def _stretched(rope: Mapping[str, Any], said: int) -> tuple[int, str]:
    kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings") or said
    longest = stretched(kind, factor, original, said)
    return longest, f"rope scaling {kind}: {factor:g} x {original}" if longest != said else ""


def _steady_positions(config: Mapping[str, Any], read: Any) -> int | None:
    """Up to which length a token's angles depend on its position alone; None: always."""
    said = [config.get("rope_parameters"), config.get("rope_scaling")]
    lengths = [rope["original_max_position_embeddings"] for rope in _ropes(read) if rope.get("rope_type") == "longrope"]
    if any('"dynamic"' in json.dumps(rope) for rope in said):
        lengths.append(_max_positions(read)[0])
    return min(lengths, default=None)


def _widest(backbone: nn.Module) -> int:
    """The largest dimension of a matrix that is no table to look up in."""
    matrices = [
        parameter
        for module in backbone.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1
    ]
    return max((max(matrix.shape[-2:]) for matrix in matrices), default=1)


def _tied(model: Any) -> str | None:
    """The name of the tensor that the head shares."""
    head = f"{path_of(model, model.get_output_embeddings())}.weight"
    found: str | None = model.all_tied_weights_keys.get(head)
    return found


def materialize_buffers(model: Any, device: torch.device) -> None:
    """Lets a module on the meta device fill its buffers (tables of angles and the like) anew, on `device`.

    Raises:
        CheckpointError: it leaves one as it was.
    """
    made = []
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                unset = torch.nan if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full(buffer.shape, unset, dtype=buffer.dtype, device=device)
                made.append((f"{path}.{name}".removeprefix("."), module, name))
    with _building:
        model.initialize_weights()  # what is still on the meta device costs nothing
    persistent = model.state_dict()
    for path, module, name in made:
        if path not in persistent and bool(module._buffers[name].isnan().any()):
            raise CheckpointError(f"{type(model).__name__} does not say what its buffer {path} holds")
