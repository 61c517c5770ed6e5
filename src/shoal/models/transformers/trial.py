"""The trial of a transformers module: it is built without weights and run without numbers to find out its structure.

Tensors on PyTorch's meta device have shapes but no data, so a model of any size is built and run in moments. A
replacement for attention records how each layer calls it, and refuses what the engine's attention cannot compute.
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
from shoal.models.config_json.fields import dtype_name
from shoal.models.config_json.rope_fields import stretched_positions
from shoal.models.spec import AttentionSpec, NormSpec
from shoal.models.transformers.cut_plan import (
    PassThroughBackbone,
    add_manifest,
    context_of,
    path_of,
    replaced_modules,
    set_context,
)
from shoal.models.transformers.fallback_spec import FallbackSpec, refusal
from shoal.models.transformers.stages import NotSplittable, StageProbe, check_stages

TRIAL = "shoal_trial"  # under which the attention of the trial is registered with transformers
_TOKENS = 6
# Further arguments that attention may get; they do not change the scores.
_HARMLESS = {"position_ids", "use_cache", "output_attentions", "output_hidden_states", "cache_position", "layer_idx"}
_SAMPLED_QUERIES = (0, 1, 63, 64, 1_000, 8_191, 8_192, 70_000, 131_071)  # positions for which a mask is examined
_STRIDE = 256  # distance of the keys that are examined first
_NO_INTERFACE = "it has no attention that transformers' AttentionInterface could replace"
_building = threading.Lock()  # building changes PyTorch's default dtype for a moment, and ranks may be threads


class NotRunnable(Exception):
    """The engine can't run a module. The message is the end of a sentence that says why."""


@dataclass(frozen=True, slots=True)
class AttentionCall:
    """A call of attention by a layer."""

    layer: int | None  # number of the layer, if the module knows it
    q_heads: int
    kv_heads: int
    head_dim: int
    spec: AttentionSpec


def inspect(config: Mapping[str, Any], architecture: str, where: str) -> FallbackSpec:
    """Return the spec of a model, from a trial of its module.

    Args:
        config: the model's config.json.
        where: the model's folder, for error messages.

    Raises:
        CheckpointError: the engine can't run this model; the message says why.
    """
    try:
        return _inspect(json.dumps(config, sort_keys=True), architecture)
    except NotRunnable as error:
        raise refusal(where, architecture, str(error)) from None
    except CheckpointError:
        raise
    except KeyError as error:
        reason = _NO_INTERFACE if error.args == (TRIAL,) else f"a trial without weights failed with KeyError: {error}"
        raise refusal(where, architecture, reason) from None
    except Exception as error:  # noqa: BLE001 - foreign code may raise anything
        first = (str(error).strip().splitlines() or ["no message"])[0]
        raise refusal(
            where, architecture, f"a trial without weights failed with {type(error).__name__}: {first}"
        ) from None


def build(config: Mapping[str, Any], architecture: str, attention: str) -> Any:
    """Build the module of a model on the meta device, in float32.

    Args:
        architecture: the name that its class must have; "": any.
        attention: the name of the attention function that it is to use.

    Raises:
        NotRunnable: transformers does not know the model, or it is not a causal language model.
    """
    kinds = load("transformers:CONFIG_MAPPING")
    kind = config.get("model_type")
    if kind not in kinds:
        own = "it has code of its own (auto_map), which is never run, and " if config.get("auto_map") else ""
        raise NotRunnable(f"{own}the installed transformers does not know the model_type {kind!r}")
    auto = load("transformers:AutoModelForCausalLM")
    plain = {key: value for key, value in config.items() if key not in ("auto_map", "dtype", "torch_dtype")}
    if kind == "mistral" and "layer_types" in plain:  # AutoConfig does the same
        kind, architecture = "ministral", architecture.replace("Mistral", "Ministral")
    with _building, torch.device("meta"):
        try:
            read = _without_dynamic_scaling(kinds[kind].from_dict(plain))
            model = auto.from_config(read, attn_implementation=attention, dtype=torch.float32)
        except ValueError as error:
            if "Unrecognized configuration class" in str(error):
                raise NotRunnable("it is not a causal language model") from None
            raise
    if architecture and type(model).__name__ != architecture:
        raise NotRunnable(f"model_type {kind!r} is {type(model).__name__} in transformers, not {architecture}")
    return model.eval()


def _rope_settings(config: Any) -> list[dict[str, Any]]:
    """Return the settings of each rope in a configuration that transformers has read."""
    found = getattr(config, "rope_parameters", None) or {}
    return [value for value in found.values() if isinstance(value, dict)] or [found]


def _without_dynamic_scaling(config: Any) -> Any:
    """Return the configuration without dynamic scaling of ropes.

    Such a rope scales nothing up to its original length, and the engine allows no longer texts.
    """
    for rope in _rope_settings(config):
        if rope.get("rope_type") == "dynamic":
            rope["rope_type"] = "default"
    return config


@lru_cache(maxsize=8)  # ranks that are threads of one process all open the same model
def _inspect(text: str, architecture: str) -> FallbackSpec:
    config: dict[str, Any] = json.loads(text)
    _register()
    model = build(config, architecture, TRIAL)
    if load("transformers.conversion_mapping:extract_weight_conversions_for_model")(model):
        raise NotRunnable("transformers rearranges its tensors while loading, which is not supported here")
    model.to(torch.bfloat16)  # some operations can't be run on the meta device in float32
    backbone = model.get_decoder()
    head = model.get_output_embeddings()
    if type(head) is not nn.Linear:
        raise NotRunnable(f"its head is a {type(head).__name__}, not a linear layer")
    calls, hidden = _try_backbone(backbone)
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
        intermediate_size=_largest_dimension(backbone),
        vocab_size=head.out_features,
        max_positions=longest,
        stretched_by=stretched_by,
        attention=tuple(layer.spec for layer in layers),
        norm=NormSpec("rms", 1e-6),
        tie_embeddings=_tied(model) is not None,
        dtype=dtype_name(config),
        steady_positions=_fixed_rope_positions(config, model.config),
        architecture=type(model).__name__,
        backbone=path_of(model, backbone),
        prefix=f"{model.base_model_prefix}." if model.base_model is not model else "",
    )
    spec = _add_stages(spec, model, backbone)
    return add_manifest(spec, model, lambda: [(call.q_heads, call.kv_heads) for call in _try_backbone(backbone)[0]])


# --- attention -------------------------------------------------------------------------------------------------------


@cache
def _register() -> None:
    load("transformers:AttentionInterface").register(TRIAL, _trial_attention)
    load("transformers:AttentionMaskInterface").register(TRIAL, _make_mask)


class _Mask:
    """A mask, represented by the function that computes its elements."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    @cached_property
    def window(self) -> int | None:
        return window_of_mask(self._function)


def _make_mask(q_length: int, kv_length: int, mask_function: Callable[..., Any], **_: Any) -> Tensor:
    mask = torch.empty(1, 1, q_length, kv_length, dtype=torch.bool, device="meta")
    mask.shoal_mask = _Mask(mask_function)  # type: ignore[attr-defined]
    return mask


def _trial_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    sliding_window: int | None = None,  # not used: the mask contains it
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Record a call of attention, or refuse it, and return a tensor with the shape of its result, [1, n, q_heads, d].

    query is [1, q_heads, n, d]; key and value are [1, kv_heads, n, d].
    """
    mask = getattr(attention_mask, "shoal_mask", None)
    unknown = sorted(name for name, value in others.items() if value is not None and name not in _HARMLESS)
    if unknown:
        raise NotRunnable(f"its attention takes {', '.join(unknown)}, which ours does not support")
    if mask is None or is_causal is False:
        raise NotRunnable("it makes its attention masks itself")
    if key.shape != value.shape or query.shape[-1] != key.shape[-1]:
        raise NotRunnable(
            f"its queries, keys and values have heads of {query.shape[-1]}, {key.shape[-1]} and {value.shape[-1]} "
            "dimensions, but the KV cache needs equal ones"
        )
    if dropout or not isinstance(scaling, float | int | None) or not isinstance(softcap, float | int | None):
        raise NotRunnable("its attention has dropout, or scores that are scaled by more than a number")
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    spec = AttentionSpec(scale, None, mask.window, None if softcap is None else float(softcap))
    context_of(module).append(
        AttentionCall(getattr(module, "layer_idx", None), query.shape[1], key.shape[1], query.shape[-1], spec)
    )
    return query.transpose(1, 2).contiguous(), None


def window_of_mask(function: Callable[..., Any]) -> int | None:
    """Return the length of the sliding window of a mask in tokens, or None if a query sees all tokens before it.

    The first key that the last of the sampled queries sees gives the length, which is then checked for all of them.

    Args:
        function: computes elements of the mask, as transformers passes it.

    Raises:
        NotRunnable: the keys that a query sees are not a window that ends at the query.
    """

    def seen(q: int, keys: Tensor) -> Tensor:
        zero = torch.zeros((), dtype=torch.int64)
        return torch.as_tensor(function(zero, zero, torch.tensor(q), keys)).expand(len(keys))

    with torch.device("cpu"):
        last = _SAMPLED_QUERIES[-1]
        coarse = torch.arange(0, last + 1, _STRIDE)
        first = _STRIDE * int(seen(last, coarse).logical_not().sum())  # number of keys before the window, rounded up
        window = last + 1 - first + int(seen(last, torch.arange(max(first - _STRIDE, 0), first)).sum())
        for q in _SAMPLED_QUERIES:
            ends = torch.tensor([q - 1, q, q + 1, q - window, q - window + 1])
            keys = torch.cat((coarse, ends[(ends >= 0) & (ends <= last)]))
            if not torch.equal(seen(q, keys), (keys <= q) & (keys > q - window)):
                raise NotRunnable("its attention mask is neither causal nor a sliding window")
    return None if window > last else window


class _UseDetector(TorchFunctionMode):
    """Records whether an operation uses a tensor."""

    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        self.tensor = tensor
        self.used = False

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        if getattr(func, "__name__", "") != "__get__":
            self.used = self.used or any(each is self.tensor for each in (*args, *given.values()))
        return func(*args, **given)


@dataclass(frozen=True, slots=True)
class _TrialPass:
    """A forward pass of a backbone, with its calls of attention and its hidden states."""

    calls: list[AttentionCall]
    hidden: Tensor
    reads_positions: bool


@torch.inference_mode()
def _run(backbone: nn.Module, watch: Callable[[Tensor], AbstractContextManager[None]] | None = None) -> _TrialPass:
    """Run a forward pass of a backbone, inside the context that `watch` returns for its tokens."""
    calls: list[AttentionCall] = []
    shape = (1, _TOKENS)
    with torch.device("meta"):
        tokens, positions = torch.zeros(shape, dtype=torch.int64), torch.zeros(shape, dtype=torch.int64)
        all_visible = torch.ones(shape, dtype=torch.int64)
        with _UseDetector(positions) as detector, watch(tokens) if watch else nullcontext():
            set_context(backbone, calls)
            out = backbone(input_ids=tokens, position_ids=positions, attention_mask=all_visible, use_cache=False)
    return _TrialPass(calls, out[0], detector.used)


def _try_backbone(
    backbone: nn.Module, watch: Callable[[Tensor], AbstractContextManager[None]] | None = None
) -> tuple[list[AttentionCall], int]:
    """Return the calls of attention in a forward pass, and the hidden size.

    Raises:
        NotRunnable: the backbone does not call attention, does not read positions, or returns no hidden states.
    """
    run = _run(backbone, watch)
    if not run.calls:
        raise NotRunnable(_NO_INTERFACE)
    if not run.reads_positions:
        raise NotRunnable("it does not take the positions of tokens (position_ids)")
    if run.hidden.shape[:2] != (1, _TOKENS):
        raise NotRunnable("it does not return one hidden state for each token")
    return run.calls, run.hidden.shape[-1]


def _add_stages(spec: FallbackSpec, model: Any, backbone: nn.Module) -> FallbackSpec:
    """Return the spec with the places where the module can be cut into pipeline stages, or the reason why it can't."""
    try:
        watch = StageProbe(model, backbone, spec.num_layers)
        _run(backbone, watch)
        found = watch.splittable_spec(spec)
        check_stages(found, model, _TOKENS, lambda: [call.layer for call in _run(backbone).calls])
    except NotSplittable as error:
        return dataclasses.replace(spec, one_stage=str(error))
    except Exception as error:  # noqa: BLE001 - foreign code may raise anything
        first = (str(error).strip().splitlines() or ["no message"])[0]
        return dataclasses.replace(spec, one_stage=f"a trial of a stage failed with {type(error).__name__}: {first}")
    return found


@torch.inference_mode()
def _try_head(model: Any, backbone: nn.Module, hidden: int) -> None:
    """Run the part of a causal model after its backbone.

    Raises:
        NotRunnable: it does not turn hidden states into the logits of its head.
    """
    given = torch.empty(1, _TOKENS, hidden, dtype=torch.bfloat16, device="meta")
    with replaced_modules(model, {path_of(model, backbone): PassThroughBackbone()}):
        logits = model(inputs_embeds=given, use_cache=False).logits
    if logits.shape != (1, _TOKENS, model.get_output_embeddings().out_features):
        raise NotRunnable(f"its logits have the shape {list(logits.shape)}")


def _layers(calls: Sequence[AttentionCall], config: Any) -> list[AttentionCall]:
    """Return the calls of attention, after checking that there is one for each layer, of the same shape.

    Raises:
        NotRunnable: a layer calls attention not at all or twice, or the shapes of heads differ between layers.
    """
    count = getattr(config, "num_hidden_layers", len(calls))
    if [call.layer for call in calls] != list(range(count)):
        raise NotRunnable(f"its {count} layers call attention {len(calls)} times, but not once each in their order")
    shapes = {(call.q_heads, call.kv_heads, call.head_dim) for call in calls}
    if len(shapes) > 1:
        raise NotRunnable(f"its layers have attention heads of {len(shapes)} different shapes")
    if calls[0].q_heads % calls[0].kv_heads:
        raise NotRunnable(f"{calls[0].q_heads} attention heads are not a multiple of {calls[0].kv_heads} KV heads")
    return list(calls)


# --- sizes and names -------------------------------------------------------------------------------------------------


def _max_positions(config: Any) -> tuple[int, str]:
    """Return the number of positions of a model, and the scaling that made it larger than in config.json, or ""."""
    for name in ("max_position_embeddings", "max_sequence_length", "max_seq_len", "n_ctx"):
        named = getattr(config, name, None)
        if isinstance(named, int) and named > 0:
            return max((_stretched(rope, named) for rope in _rope_settings(config)), key=lambda found: found[0])
    raise NotRunnable("its config.json names no max_position_embeddings")


def _stretched(rope: Mapping[str, Any], named: int) -> tuple[int, str]:
    kind, factor = rope.get("rope_type", "default"), rope.get("factor") or 1.0
    original = rope.get("original_max_position_embeddings") or named
    longest = stretched_positions(kind, factor, original, named)
    return longest, f"rope scaling {kind}: {factor:g} x {original}" if longest != named else ""


def _fixed_rope_positions(config: Mapping[str, Any], read: Any) -> int | None:
    """Return the length of texts up to which angles depend only on the position; None if they always do."""
    ropes = [config.get("rope_parameters"), config.get("rope_scaling")]
    lengths = [
        rope["original_max_position_embeddings"] for rope in _rope_settings(read) if rope.get("rope_type") == "longrope"
    ]
    if any('"dynamic"' in json.dumps(rope) for rope in ropes):
        lengths.append(_max_positions(read)[0])
    return min(lengths, default=None)


def _largest_dimension(backbone: nn.Module) -> int:
    """Return the largest dimension of all matrices of a backbone, except the tables of embeddings."""
    matrices = [
        parameter
        for module in backbone.modules()
        if not isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1
    ]
    return max((max(matrix.shape[-2:]) for matrix in matrices), default=1)


def _tied(model: Any) -> str | None:
    """Return the name of the tensor that the head is tied to, or None."""
    head = f"{path_of(model, model.get_output_embeddings())}.weight"
    found: str | None = model.all_tied_weights_keys.get(head)
    return found


def materialize_buffers(model: Any, device: torch.device) -> None:
    """Have a module on the meta device compute its buffers (such as tables of angles) on `device`.

    Raises:
        CheckpointError: the module does not set a buffer that is not in the checkpoint either.
    """
    made = []
    for path, module in model.named_modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                unset = torch.nan if buffer.is_floating_point() else 0
                module._buffers[name] = torch.full(buffer.shape, unset, dtype=buffer.dtype, device=device)
                made.append((f"{path}.{name}".removeprefix("."), module, name))
    with _building:
        model.initialize_weights()  # for tensors on the meta device this costs nothing
    persistent = model.state_dict()
    for path, module, name in made:
        if path not in persistent and bool(module._buffers[name].isnan().any()):
            raise CheckpointError(f"{type(model).__name__} does not compute the values of its buffer {path}")
