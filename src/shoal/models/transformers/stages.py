"""A module of transformers as stages of a pipeline: layers that are elsewhere have stand-ins, through which the
residual stream comes in and goes out.

Whether a module can be cut so is watched in its trial: each layer must take the stream as the one before left it, and
nothing else that is made of the tokens.
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

from shoal.models.transformers.cut_plan import path_of, swapped
from shoal.models.transformers.fallback_spec import FallbackSpec
from shoal.parallel.stages import Stage, stages


class OneStage(Exception):
    """Why a module can't be cut into stages: the end of a sentence."""


@dataclass(slots=True)
class ResidualStream:
    """The residual stream [1, n, hidden] at the ends of a stage, in a step."""

    received: Tensor | None = None
    left: Tensor | None = None


# Stand-ins.


class Absent(nn.Module):
    """In the place of a layer that another stage has. The stream goes through it, or enters or leaves the stage.

    Models look at attributes of their layers, so it shows those of the layer it stands for.
    """

    def __init__(self, layer: nn.Module, through: Callable[[Tensor], Tensor], *, in_tuple: bool) -> None:
        super().__init__()
        object.__setattr__(self, "stands_for", layer)  # not as a part of this module
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


class Blank(nn.Module):
    """In the place of a module ahead of the first layer, on stages that have the stream from elsewhere: zeros of the
    same shape."""

    def __init__(self, width: int, stream: ResidualStream) -> None:
        super().__init__()
        self.width = width
        self.stream = stream

    def forward(self, x: Tensor, *_args: Any, **_options: Any) -> Tensor:
        return _of(self.stream.received).new_zeros((*_rows(x), self.width))


class Skipped(nn.Module):
    """In the place of a module behind the last layer, on stages whose stream has left by then."""

    def forward(self, x: Tensor, *_args: Any, **_options: Any) -> Tensor:
        return x


def stand_ins(spec: FallbackSpec, model: nn.Module, stage: Stage, stream: ResidualStream) -> dict[str, nn.Module]:
    """Path of each module that this stage does not have -> what stands in its place."""

    def enter(_x: Tensor) -> Tensor:
        return _of(stream.received)

    def leave(x: Tensor) -> Tensor:
        stream.left = x
        return x

    def layer(i: int) -> Absent:
        through = {stage.layers.start - 1: enter, stage.layers.stop: leave}.get(i, _same)
        return Absent(model.get_submodule(f"{spec.layers}.{i}"), through, in_tuple=spec.layers_give_tuples)

    absent = [i for i in range(spec.num_layers) if i not in stage.layers]
    found: dict[str, nn.Module] = {f"{spec.layers}.{i}": layer(i) for i in absent}
    if not stage.first:
        found |= {path: Blank(width, stream) for path, width in spec.before}
    if not stage.last:
        found |= {path: Skipped() for path in spec.behind}
    return found


def _same(x: Tensor) -> Tensor:
    return x


def _of(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("a stage that is not the first computes without the stream of the stage before")
    return tensor


# What is found out in a trial.


class _MadeOf(TorchFunctionMode):
    """Knows every tensor that some operation made of one of the first."""

    def __init__(self, first: Tensor) -> None:
        super().__init__()
        self._made = {id(first): first}  # they are kept, so that no other tensor has their number

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
    stream: Tensor
    others: tuple[Tensor, ...]
    out: Tensor
    in_tuple: bool


class Watch:
    """What goes into the layers of a backbone and comes out of them, and which other modules run before and behind."""

    def __init__(self, model: nn.Module, backbone: nn.Module, num_layers: int) -> None:
        self._model = model
        self._list, self._layers = _layer_list(backbone, num_layers)
        inside = {module for layer in self._layers for module in layer.modules()}
        self._others = [module for module in backbone.modules() if module not in inside and _has_parameters(module)]
        self._calls: list[_LayerCall] = []
        self._begun = False
        self._phases: dict[nn.Module, set[str]] = defaultdict(set)
        self._widths: dict[nn.Module, int | None] = {}
        self._made: _MadeOf | None = None

    @contextmanager
    def __call__(self, tokens: Tensor) -> Iterator[None]:
        """For one run of the backbone on these tokens."""
        with ExitStack() as stack:
            for layer in self._layers:
                stack.callback(layer.register_forward_pre_hook(self._before_layer).remove)
                stack.callback(layer.register_forward_hook(self._behind_layer, with_kwargs=True).remove)
            for module in self._others:
                stack.callback(module.register_forward_hook(self._behind_other).remove)
            with _MadeOf(tokens) as self._made:
                yield

    def _before_layer(self, _layer: nn.Module, _args: Any) -> None:
        self._begun = True

    def _behind_layer(self, _layer: nn.Module, args: Any, options: dict[str, Any], out: Any) -> None:
        stream = args[0] if args else options.get("hidden_states")
        first = out[0] if isinstance(out, tuple) else out
        if not isinstance(stream, Tensor) or not isinstance(first, Tensor):
            raise OneStage("its layers do not hand one tensor on")
        others = tuple(tensor for tensor in _tensors((args, options)) if tensor is not stream)
        self._calls.append(_LayerCall(stream, others, first, isinstance(out, tuple)))

    def _behind_other(self, module: nn.Module, args: Any, out: Any) -> None:
        done = len(self._calls) == len(self._layers)
        self._phases[module].add("before" if not self._begun else "behind" if done else "between")
        if self._made is not None and not self._begun:  # it will be blank elsewhere, and so what is made of it
            self._made.add(_tensors(out))
        x = args[0] if args else None
        fits = isinstance(x, Tensor) and isinstance(out, Tensor) and out.shape[:-1] == _rows(x)
        self._widths[module] = out.shape[-1] if fits else None

    def found(self, spec: FallbackSpec) -> FallbackSpec:
        """The spec, with where its stages can be cut.

        Raises:
            OneStage: they can't.
        """
        calls, made = self._calls, self._made
        if made is None or len(calls) != len(self._layers):
            raise OneStage("its layers do not run one after the other")
        if any(after.stream is not before.out for before, after in pairwise(calls)):
            raise OneStage("something is done to the residual stream between its layers")
        if any(tensor in made for call in calls for tensor in call.others):
            raise OneStage("its layers take more from what came before than the residual stream")
        dtype = next(self._model.parameters()).dtype
        if any(call.out.shape[-1] != spec.hidden_size or call.out.dtype != dtype for call in calls):
            raise OneStage("its residual stream has not the width or the type of what comes out")
        if len({call.in_tuple for call in calls}) > 1:
            raise OneStage("its layers give their results in different ways")
        before = {
            path_of(self._model, module): width
            for module, width in self._widths.items()
            if self._phases[module] == {"before"} and width is not None
        }
        behind = [module for module, phases in self._phases.items() if phases == {"behind"} and self._widths[module]]
        return dataclasses.replace(
            spec,
            layers=path_of(self._model, self._list),
            layers_give_tuples=calls[0].in_tuple,
            before=tuple(before.items()),
            behind=tuple(path_of(self._model, module) for module in behind),
        )


def check_stages(spec: FallbackSpec, model: nn.Module, tokens: int, run: Callable[[], Sequence[int | None]]) -> None:
    """Runs the backbone as some stages would: the first layer, the last one, and those between.

    `run` has so many tokens, and gives the layers that called attention.

    Raises:
        OneStage: others run than the stage's, or nothing comes out.
        Exception: whatever the module raises.
    """
    inner = (1, spec.num_layers - 2, 1) if spec.num_layers > 2 else (1,) * spec.num_layers
    for stage in stages(inner):
        given = torch.empty(1, tokens, spec.hidden_size, dtype=torch.bfloat16, device="meta")
        stream = ResidualStream(None if stage.first else given)
        with swapped(model, stand_ins(spec, model, stage, stream)):
            ran = run()
        if list(ran) != list(stage.layers):
            raise OneStage(f"as a stage of layers {list(stage.layers)} it runs the layers {list(ran)}")
        if not stage.last and (stream.left is None or stream.left.shape != given.shape):
            raise OneStage(f"as a stage of layers {list(stage.layers)} it gives no residual stream")


def _layer_list(backbone: nn.Module, num_layers: int) -> tuple[nn.ModuleList, list[nn.Module]]:
    for module in backbone.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module, list(module)
    raise OneStage(f"its {num_layers} layers are not in one list")


def _has_parameters(module: nn.Module) -> bool:
    """Of its own."""
    return next(module.parameters(recurse=False), None) is not None


def _rows(x: Tensor) -> torch.Size:
    """Of numbers to look up, or of rows of values."""
    return x.shape[:-1] if x.is_floating_point() else x.shape


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
