"""Cutting a transformers module into pipeline stages.

On each stage the layers of other stages are replaced by stand-ins, through which the residual stream enters and leaves
the stage. The trial of a module finds out whether this is possible: each layer must take the stream as the layer before
left it, and no other tensor that depends on the tokens.
"""

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from shoal.models.transformers.cut_plan import path_of, replaced_modules
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.parallel.stages import Stage, make_stages


class NotSplittable(Exception):
    """A module can't be cut into stages. The message is the end of a sentence that begins with "because"."""


@dataclass(slots=True)
class ResidualStream:
    """The residual stream [1, n, hidden] that enters and leaves a stage in one step."""

    received: Tensor | None = None  # from the stage before; None on the first stage
    left: Tensor | None = None  # for the stage after


# --- stand-ins for modules that a stage does not have ----------------------------------------------------------------


class AbsentLayer(nn.Module):
    """A stand-in for a layer of another stage, which passes the residual stream to `through`.

    It has the attributes of the layer that it replaces, since models read attributes of their layers.
    """

    def __init__(self, layer: nn.Module, through: Callable[[Tensor], Tensor], *, in_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "stands_for", layer)  # so that torch does not make it a part of this module
        self.through = through
        self.in_tuple = in_tuple

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(vars(self)["stands_for"], name)

    def forward(self, hidden_states: Tensor, *_args: Any, **_options: Any) -> Tensor | tuple[Tensor]:
        out = self.through(hidden_states)
        return (out,) if self.in_tuple else out


class ZeroOutput(nn.Module):
    """A stand-in for a module before the layers, on every stage but the first: it returns zeros of the same shape."""

    def __init__(self, width: int, stream: ResidualStream) -> None:
        super().__init__()
        self.width = width
        self.stream = stream

    def forward(self, x: Tensor, *_args: Any, **_options: Any) -> Tensor:
        return _require_stream(self.stream.received).new_zeros((*_rows(x), self.width))


class Skipped(nn.Module):
    """A stand-in for a module after the layers, on every stage but the last: it returns its input."""

    def forward(self, x: Tensor, *_args: Any, **_options: Any) -> Tensor:
        return x


def stand_ins(spec: FallbackSpec, model: nn.Module, stage: Stage, stream: ResidualStream) -> dict[str, nn.Module]:
    """Return a stand-in for each module that this stage does not have, by the module's path."""

    def enter(_x: Tensor) -> Tensor:
        return _require_stream(stream.received)

    def leave(x: Tensor) -> Tensor:
        stream.left = x
        return x

    def layer(i: int) -> AbsentLayer:
        through = {stage.layers.start - 1: enter, stage.layers.stop: leave}.get(i, _unchanged)
        return AbsentLayer(model.get_submodule(f"{spec.layers}.{i}"), through, in_tuple=spec.layers_give_tuples)

    absent = [i for i in range(spec.num_layers) if i not in stage.layers]
    replacements: dict[str, nn.Module] = {f"{spec.layers}.{i}": layer(i) for i in absent}
    if not stage.first:
        replacements |= {path: ZeroOutput(width, stream) for path, width in spec.modules_before}
    if not stage.last:
        replacements |= {path: Skipped() for path in spec.modules_after}
    return replacements


def _unchanged(x: Tensor) -> Tensor:
    return x


def _require_stream(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a stage that is not the first has no residual stream of the stage before")
    return tensor


# --- the trial -------------------------------------------------------------------------------------------------------


class _DerivedTensors(TorchFunctionMode):
    """The set of all tensors that torch's operations compute, directly or not, from the `first` tensor."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self._made = {id(first): first}  # the tensors are kept alive, so that no other gets the same id()

    def __contains__(self, tensor: Tensor) -> bool:
        return id(tensor) in self._made

    def add(self, tensors: Sequence[Tensor]) -> None:
        self._made |= {id(tensor): tensor for tensor in tensors}

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        out = func(*args, **given)
        if any(tensor in self for tensor in _tensors((args, given))):
            self.add(_tensors(out))
        return out


@dataclass(frozen=True, slots=True)
class _LayerCall:
    """A call of one layer."""

    stream: Tensor
    others: tuple[Tensor, ...]  # all other tensors in its arguments
    out: Tensor
    in_tuple: bool  # `out` was the first element of a tuple


class StageProbe:
    """Watches one run of a backbone: the inputs and outputs of its layers, and which modules run before and after."""

    def __init__(self, model: nn.Module, backbone: nn.Module, num_layers: int) -> None:
        self._model = model
        self._list, self._layers = _layer_list(backbone, num_layers)
        inside = {module for layer in self._layers for module in layer.modules()}
        self._others = [module for module in backbone.modules() if module not in inside and _has_parameters(module)]
        self._calls: list[_LayerCall] = []
        self._begun = False
        self._phases: dict[nn.Module, set[str]] = defaultdict(set)
        self._widths: dict[nn.Module, int | None] = {}
        self._made: _DerivedTensors | None = None

    @contextmanager
    def __call__(self, tokens: Tensor) -> Iterator[None]:
        """Watch one run of the backbone on these tokens, inside a `with` statement."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_pre_hook(self._before_layer).remove)
                stack.callback(layer.register_forward_hook(self._after_layer, with_kwargs=True).remove)
            for module in self._others:
                stack.callback(module.register_forward_hook(self._after_other).remove)
            with _DerivedTensors(tokens) as self._made:
                yield

    def _before_layer(self, _layer: nn.Module, _args: Any) -> None:
        self._begun = True

    def _after_layer(self, _layer: nn.Module, args: Any, options: dict[str, Any], out: Any) -> None:
        stream = args[0] if args else options.get("hidden_states")
        first = out[0] if isinstance(out, tuple) else out
        if not isinstance(stream, Tensor) or not isinstance(first, Tensor):
            raise NotSplittable("its layers do not pass one tensor on")
        others = tuple(tensor for tensor in _tensors((args, options)) if tensor is not stream)
        self._calls.append(_LayerCall(stream, others, first, isinstance(out, tuple)))

    def _after_other(self, module: nn.Module, args: Any, out: Any) -> None:
        done = len(self._calls) == len(self._layers)
        self._phases[module].add("before" if not self._begun else "after" if done else "between")
        if self._made is not None and not self._begun:  # on other stages this output will be zeros
            self._made.add(_tensors(out))
        x = args[0] if args else None
        fits = isinstance(x, Tensor) and isinstance(out, Tensor) and out.shape[:-1] == _rows(x)
        self._widths[module] = out.shape[-1] if fits else None

    def splittable_spec(self, spec: FallbackSpec) -> FallbackSpec:
        """Return the spec with the layers and modules at which the backbone can be cut into stages.

        Raises:
            NotSplittable: it can't be cut.
        """
        calls, made = self._calls, self._made
        if made is None or len(calls) != len(self._layers):
            raise NotSplittable("its layers do not run one after the other")
        if any(after.stream is not before.out for before, after in pairwise(calls)):
            raise NotSplittable("it changes the residual stream between its layers")
        if any(tensor in made for call in calls for tensor in call.others):
            raise NotSplittable("its layers use other results of earlier stages than the residual stream")
        dtype = next(self._model.parameters()).dtype
        if any(call.out.shape[-1] != spec.hidden_size or call.out.dtype != dtype for call in calls):
            raise NotSplittable("its residual stream does not have the width or the type of its output")
        if len({call.in_tuple for call in calls}) > 1:
            raise NotSplittable("some of its layers return tuples and others do not")
        before = {
            path_of(self._model, module): width
            for module, width in self._widths.items()
            if self._phases[module] == {"before"} and width is not None
        }
        after = [module for module, phases in self._phases.items() if phases == {"after"} and self._widths[module]]
        return dataclasses.replace(
            spec,
            layers=path_of(self._model, self._list),
            layers_give_tuples=calls[0].in_tuple,
            modules_before=tuple(before.items()),
            modules_after=tuple(path_of(self._model, module) for module in after),
        )


def check_stages(spec: FallbackSpec, model: nn.Module, tokens: int, run: Callable[[], Sequence[int | None]]) -> None:
    """Run the backbone as three stages would: the first layer, the layers between, and the last one.

    Args:
        tokens: the number of tokens in a run.
        run: runs the backbone; returns the numbers of the layers that called attention.

    Raises:
        NotSplittable: a stage runs other layers than its own, or no residual stream leaves it.
        Exception: any error that the module raises.
    """
    inner = (1, spec.num_layers - 2, 1) if spec.num_layers > 2 else (1,) * spec.num_layers
    for stage in make_stages(inner):
        given = torch.empty(1, tokens, spec.hidden_size, dtype=torch.bfloat16, device="meta")
        stream = ResidualStream(None if stage.first else given)
        with replaced_modules(model, stand_ins(spec, model, stage, stream)):
            ran = run()
        if list(ran) != list(stage.layers):
            raise NotSplittable(f"as a stage of layers {list(stage.layers)} it runs the layers {list(ran)}")
        if not stage.last and (stream.left is None or stream.left.shape != given.shape):
            raise NotSplittable(f"as a stage of layers {list(stage.layers)} it returns no residual stream")


def _layer_list(backbone: nn.Module, num_layers: int) -> tuple[nn.ModuleList, list[nn.Module]]:
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module, list(module)
    raise NotSplittable(f"its {num_layers} layers are not in one list")


def _has_parameters(module: nn.Module) -> bool:
    """Return whether a module has parameters itself, not only in its submodules."""
    return next(module.parameters(recurse=False), None) is not None


def _rows(x: Tensor) -> torch.Size:
    """Return the shape of `x` without the dimension of values; ids, which are looked up in a table, have none."""
    return x.shape[:-1] if x.is_floating_point() else x.shape


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
