"""Overriding fields of config.json (`--hf-overrides`). Free of torch."""

import copy
from collections.abc import Mapping
from typing import Any

_ROPES = ("rope_scaling", "rope_parameters")
_FULL, _SLIDING = "full_attention", "sliding_attention"
# Fields of config.json that `rope_parameters` may have too. Each has its name there, and the kind of layers for which
# it counts if `rope_parameters` has one rope for each kind of layer.
_ROPE_FIELDS = {
    "rope_theta": (_FULL, "rope_theta"),
    "rotary_emb_base": (_FULL, "rope_theta"),
    "rope_local_base_freq": (_SLIDING, "rope_theta"),
    "partial_rotary_factor": (_FULL, "partial_rotary_factor"),
    "rotary_pct": (_FULL, "partial_rotary_factor"),
}


def apply_overrides(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return `config` with the overrides applied: objects are merged field by field, other values are replaced.

    A rope (`rope_scaling` or `rope_parameters`) is replaced as a whole, since the fields of one kind of scaling mean
    nothing to another kind. Only its base (`rope_theta`) and the share of a head that it rotates are kept, unless they
    are overridden too.
    """
    found = {**config, **overrides}
    for key, value in overrides.items():
        before = config.get(key)
        if (
            isinstance(value, Mapping)
            and isinstance(before, Mapping)
            and not (key in _ROPES and _is_flat(value, before))
        ):
            found[key] = apply_overrides(before, value)
    if overrides.keys().isdisjoint({*_ROPES, *_ROPE_FIELDS}):
        return found
    stored = [rope for rope in map(config.get, _ROPES) if isinstance(rope, Mapping)]
    ropes = {key: copy.deepcopy(dict(found[key])) for key in _ROPES if isinstance(found.get(key), Mapping)}
    if any(key in overrides for key in _ROPES) and _is_flat(*stored):
        kept = {name: rope[name] for rope in stored for _, name in _ROPE_FIELDS.values() if name in rope}
        ropes = {key: {**kept, **rope} for key, rope in ropes.items() if key in overrides} or {_ROPES[1]: kept}
    for key, rope in ropes.items():
        _drop_replaced(rope, overrides, overrides.get(key) or {})
    return {key: value for key, value in found.items() if key not in _ROPES} | ropes


def _drop_replaced(rope: dict[str, Any], overrides: Mapping[str, Any], override: Mapping[str, Any]) -> None:
    """Remove from a rope the fields that `overrides` sets outside of it, such as `rope_theta`.

    `override` is the override of this rope itself; the fields that it sets are kept.
    """
    for key, (layers, name) in _ROPE_FIELDS.items():
        if key not in overrides:
            continue
        if _is_flat(rope) and layers == _FULL and name not in override:
            rope.pop(name, None)
        elif isinstance(rope.get(layers), dict) and name not in (override.get(layers) or {}):
            rope[layers].pop(name, None)


def _is_flat(*ropes: Mapping[str, Any]) -> bool:
    """Return whether each of these describes one rope for all layers, and not one for each kind of layer."""
    return not any(isinstance(value, Mapping) for rope in ropes for value in rope.values())
