"""What somebody says of a model beside its config.json (`--hf-overrides`), put over it. Free of torch."""

import copy
from collections.abc import Mapping
from typing import Any

_ROPES = ("rope_scaling", "rope_parameters")
_FULL, _SLIDING = "full_attention", "sliding_attention"
# How config.json spells what `rope_parameters` may say too, and for which layers where it speaks of them one by one.
_ANGLES = {
    "rope_theta": (_FULL, "rope_theta"),
    "rotary_emb_base": (_FULL, "rope_theta"),
    "rope_local_base_freq": (_SLIDING, "rope_theta"),
    "partial_rotary_factor": (_FULL, "partial_rotary_factor"),
    "rotary_pct": (_FULL, "partial_rotary_factor"),
}


def apply(config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """`config`, where an object of `overrides` is put over one of the same name, and all else stands in its place.

    A rope is replaced as a whole, however either spells it, since what one kind of scaling needs means nothing to
    another; but its base and the share of a head that it turns stay, where nothing else is said.
    """
    found = {**config, **overrides}
    for key, value in overrides.items():
        before = config.get(key)
        if isinstance(value, Mapping) and isinstance(before, Mapping) and not (key in _ROPES and _flat(value, before)):
            found[key] = apply(before, value)
    if overrides.keys().isdisjoint({*_ROPES, *_ANGLES}):
        return found
    stored = [rope for rope in map(config.get, _ROPES) if isinstance(rope, Mapping)]
    ropes = {key: copy.deepcopy(dict(found[key])) for key in _ROPES if isinstance(found.get(key), Mapping)}
    if any(key in overrides for key in _ROPES) and _flat(*stored):
        kept = {name: rope[name] for rope in stored for _, name in _ANGLES.values() if name in rope}
        ropes = {key: {**kept, **rope} for key, rope in ropes.items() if key in overrides} or {_ROPES[1]: kept}
    for key, rope in ropes.items():
        _drop_stale(rope, overrides, overrides.get(key) or {})
    return {key: value for key, value in found.items() if key not in _ROPES} | ropes


def _drop_stale(rope: dict[str, Any], overrides: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Takes out of a rope what `overrides` says beside it. `said`: what they say of this rope itself."""
    for key, (layers, name) in _ANGLES.items():
        if key not in overrides:
            continue
        if _flat(rope) and layers == _FULL and name not in said:
            rope.pop(name, None)
        elif isinstance(rope.get(layers), dict) and name not in (said.get(layers) or {}):
            rope[layers].pop(name, None)


def _flat(*ropes: Mapping[str, Any]) -> bool:
    """Does none of them speak of kinds of layers one by one?"""
    return not any(isinstance(value, Mapping) for rope in ropes for value in rope.values())
