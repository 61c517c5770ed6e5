"""Overriding fields of config.json."""

from typing import Any

import pytest

from shoal.models.config_json.overrides import apply_overrides

THETA = {"rope_theta": 5e5}
PLAIN = {"rope_type": "default", **THETA}
LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
BY_LAYER = {"full_attention": {**PLAIN}, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}


def test_values_are_replaced_and_objects_are_merged() -> None:
    config = {"a": 1, "b": [1, 2], "text_config": {"x": 1, "y": {"z": 2}}}
    overrides = {"b": [3], "c": None, "text_config": {"y": {"z": 3}}}
    assert apply_overrides(config, overrides) == {"a": 1, "b": [3], "c": None, "text_config": {"x": 1, "y": {"z": 3}}}
    assert apply_overrides(config, {}) == config
    assert config == {"a": 1, "b": [1, 2], "text_config": {"x": 1, "y": {"z": 2}}}


@pytest.mark.parametrize(
    ("config", "overrides", "expected"),
    [
        # Another kind of scaling keeps only the base of the scaling that it replaces.
        ({"rope_scaling": LLAMA3, **THETA}, {"rope_scaling": LINEAR}, {"rope_scaling": LINEAR, **THETA}),
        ({"rope_scaling": {**LLAMA3, "type": "x"}}, {"rope_parameters": LINEAR}, {"rope_parameters": LINEAR}),
        ({"rope_parameters": {**LLAMA3, **THETA}}, {"rope_scaling": LINEAR}, {"rope_scaling": {**THETA, **LINEAR}}),
        (
            {"rope_parameters": {**LLAMA3, **THETA}},
            {"rope_parameters": LINEAR},
            {"rope_parameters": {**THETA, **LINEAR}},
        ),
        ({"rope_parameters": {**LLAMA3, **THETA}}, {"rope_scaling": None}, {"rope_parameters": THETA}),
        # A base that is overridden at the top level replaces the base within the rope's object.
        (
            {"rope_parameters": PLAIN},
            {"rope_theta": 9.0},
            {"rope_parameters": {"rope_type": "default"}, "rope_theta": 9.0},
        ),
        (
            {"rope_parameters": PLAIN},
            {"rope_theta": 9.0, "rope_scaling": LINEAR},
            {"rope_scaling": LINEAR, "rope_theta": 9.0},
        ),
        (
            {"rope_parameters": {**PLAIN, "partial_rotary_factor": 0.5}},
            {"rotary_pct": 0.25},
            {"rope_parameters": PLAIN, "rotary_pct": 0.25},
        ),
        # If kinds of layers have ropes of their own, each is overridden by itself.
        (
            {"rope_parameters": BY_LAYER},
            {"rope_parameters": {"full_attention": LINEAR}},
            {"rope_parameters": {**BY_LAYER, "full_attention": {**PLAIN, **LINEAR}}},
        ),
        (
            {"rope_parameters": BY_LAYER},
            {"rope_scaling": LINEAR},
            {"rope_parameters": BY_LAYER, "rope_scaling": LINEAR},
        ),
        (
            {"rope_parameters": BY_LAYER},
            {"rope_local_base_freq": 7.0},
            {
                "rope_parameters": {**BY_LAYER, "sliding_attention": {"rope_type": "default"}},
                "rope_local_base_freq": 7.0,
            },
        ),
    ],
)
def test_ropes_are_overridden(config: dict[str, Any], overrides: dict[str, Any], expected: dict[str, Any]) -> None:
    before = repr(config)
    assert apply_overrides(config, overrides) == expected
    assert repr(config) == before
