"""The options in one table for the command line, the library and the docs."""

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config.engine_options import EngineOptions, from_environment, options, strange_variables
from shoal.config.option import Option
from shoal.config.option_forms import SpeculativeConfig
from shoal.errors import ConfigError
from shoal.values import format_bytes, parse_bytes
from support.fakes import steady

HUGE = 10**5000  # too long for Python to print, and larger than every float
KNOWN = {option.name: option for option in options()}


def test_values_reach_their_sections() -> None:
    found = EngineOptions.from_flat("m", {"block_size": 8, "seed": 3, "tensor_parallel_size": 2, "max_num_seqs": 5})
    assert found.model == "m"
    assert (found.cache.block_size, found.model_options.seed) == (8, 3)
    assert (found.parallel.tensor_parallel_size, found.scheduler.max_num_seqs) == (2, 5)
    assert EngineOptions.from_flat("m", {}) == EngineOptions("m")


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("max_num_seq", "max_num_seqs"),
        ("blocksize", "block_size"),
        ("gpu_memory", "gpu_memory_utilization"),
    ],
)
def test_the_error_of_a_misspelt_name_suggests_the_right_one(wrong: str, right: str) -> None:
    with pytest.raises(ConfigError, match=f"unknown option {wrong}; did you mean {right}"):
        EngineOptions.from_flat("m", {wrong: 1})


def test_the_error_of_an_unknown_name_lists_all_names() -> None:
    for name in ("xyzzy", "block_chain"):  # the second is a little like block_size
        with pytest.raises(ConfigError, match=r"known are revision, .*max_in_flight"):
            EngineOptions.from_flat("m", {name: 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"block_size": "8"}, "--block-size takes an integer, got '8'"),
        ({"block_size": 8.0}, "--block-size takes an integer"),
        ({"block_size": True}, "--block-size takes an integer"),
        ({"block_size": None}, "--block-size takes an integer"),
        ({"engine_process": 1}, "--engine-process takes true or false"),
        ({"start_timeout": True}, "--start-timeout takes a number"),
        ({"start_timeout": "long"}, "--start-timeout takes a number"),
        ({"revision": 5}, "--revision takes a text"),
        ({"dtype": "int8"}, "--dtype must be one of auto, float32, bfloat16, float16, float, half, got 'int8'"),
        ({"block_size": 0}, "--block-size must be at least 1, got 0"),
        ({"seed": -1}, "--seed must be at least 0"),
        ({"start_timeout": math.nan}, "--start-timeout takes a finite number"),
        ({"gpu_memory_utilization": 0.0}, r"in \(0, 1\]"),
        ({"gpu_memory_utilization": 1.01}, r"in \(0, 1\]"),
        ({"gpu_memory_utilization": math.inf}, "--gpu-memory-utilization takes a finite number"),
        ({"device_memory": "lots"}, "--device-memory takes a number of bytes"),
        ({"device_memory": "0"}, "--device-memory must be at least 1"),
        # Values that no message between processes can carry, or that Python can't even print.
        ({"seed": 2**63}, "--seed must be at most 9223372036854775807, got 9223372036854775808"),
        ({"seed": HUGE}, "--seed must be at most 9223372036854775807, got a number that is too long to be shown"),
        ({"block_size": -HUGE}, "--block-size must be at least 1, got a number that is too long to be shown"),
        ({"device_memory": 10**30}, "--device-memory must be at most 9223372036854775807"),
        ({"kv_cache_memory_bytes": "999999999TiB"}, "--kv-cache-memory-bytes must be at most 9223372036854775807"),
        ({"start_timeout": HUGE}, "--start-timeout must be at most 9223372036854775807"),
        ({"gpu_memory_utilization": -HUGE}, "--gpu-memory-utilization must be at most"),
        ({"tensor_parallel_split": [10**6 + 1, 1]}, "--tensor-parallel-split takes positive integers up to 1000000"),
        ({"tensor_parallel_split": f"{10**30},1"}, "--tensor-parallel-split takes positive integers up to 1000000"),
        ({"tensor_parallel_split": [HUGE]}, "--tensor-parallel-split takes positive integers"),
        ({"tensor_parallel_split": b"\x01\x01"}, r"--tensor-parallel-split takes .* got b'\\x01\\x01'"),
        ({"tensor_parallel_split": bytearray(b"\x01")}, "--tensor-parallel-split takes positive integers"),
        ({"tensor_parallel_split": [True, 1]}, "--tensor-parallel-split takes positive integers"),
        ({"pipeline_layer_partition": [2, 0]}, "--pipeline-layer-partition takes positive integers up to 10000, the"),
        (
            {"pipeline_layer_partition": "3,"},
            r"--pipeline-layer-partition takes .*, the number of layers of each stage \(.*\), got '3,'",
        ),
        ({"pipeline_layer_partition": [HUGE]}, "--pipeline-layer-partition takes positive integers"),
        ({"pipeline_parallel_size": 0}, "--pipeline-parallel-size must be at least 1"),
        ({"data_parallel_size": -1}, "--data-parallel-size must be at least 1"),
        ({"all2all_backend": "pplx"}, "--all2all-backend must be one of auto, allgather_reducescatter, all_to_all"),
    ],
)
def test_wrong_values_are_refused_by_flag(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineOptions.from_flat("m", values)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"model": "a/b", "revision": 5}, "revision must be a string, got 5"),
        ({"model": "a/b", "revision": []}, "revision must be a string"),
        ({"method": "draft_model"}, "method draft_model needs model"),
        ({"method": "draft_model", "model": ""}, "method draft_model needs model"),
        ({"method": "draft_model", "model": 5}, "method draft_model needs model"),
        ({"method": "ngram", "model": "a/b"}, "method ngram does not use model"),
        ({"method": "ngram", "revision": "main"}, "method ngram does not use revision"),
        ({"model": "a/b", "prompt_lookup_max": 3}, "method draft_model does not use prompt_lookup_max"),
        ({"model": "a/b", "prompt_lookup_min": 3}, "method draft_model does not use prompt_lookup_min"),
        ({"method": HUGE}, "method must be ngram or draft_model"),
        (
            {"method": "ngram", "num_speculative_tokens": HUGE},
            r"num_speculative_tokens must be an integer in \[1, 64\]",
        ),
        ({HUGE: 1}, "unknown key a number that is too long"),
        (HUGE, "takes a JSON object"),
    ],
    ids=range(13),
)
def test_keys_that_speculation_does_not_have(value: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=f"^--speculative-config.*{says}"):
        EngineOptions.from_flat("m", {"speculative_config": value})


def test_speculation_takes_the_keys_of_its_method() -> None:
    found = KNOWN["speculative_config"].check({"model": "a/b", "revision": "main", "num_speculative_tokens": 3})
    assert found == SpeculativeConfig("draft_model", num_speculative_tokens=3, model="a/b", revision="main")
    found = KNOWN["speculative_config"].check({"method": "ngram", "prompt_lookup_max": 3, "model": None})
    assert found == SpeculativeConfig("ngram", prompt_lookup_max=3)


def test_the_largest_values_are_accepted() -> None:
    assert KNOWN["seed"].check(2**63 - 1) == 2**63 - 1
    assert KNOWN["tensor_parallel_split"].check([10**6, 1]) == (10**6, 1)


def test_similar_types_are_accepted() -> None:
    found = EngineOptions.from_flat(
        "m", {"start_timeout": 5, "device_memory": "2GiB", "kv_cache_memory_bytes": 10**9, "max_model_len": None}
    )
    assert isinstance(found.parallel.start_timeout, float)
    assert (found.cache.device_memory, found.cache.kv_cache_memory_bytes) == (2**31, 10**9)
    assert found.model_options.max_model_len is None
    assert EngineOptions.from_flat("m", {"gpu_memory_utilization": 1}).cache.gpu_memory_utilization == 1.0


@pytest.mark.parametrize("option", KNOWN.values(), ids=KNOWN)
def test_every_option_has_a_help_text_and_a_valid_default(option: Option) -> None:
    assert len(option.help) > 10
    assert option.group
    assert option.check(option.default) == option.default
    assert option.optional or option.default is not None
    assert option.flag == "--" + option.name.replace("_", "-")
    for choice in option.choices:
        assert option.check(choice) == choice


def test_names_and_flags_are_unique() -> None:
    every = list(options())
    assert len(KNOWN) == len(every)
    short = [option.short for option in every if option.short]
    assert len(set(short)) == len(short)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("1500000", 1_500_000),
        ("512MiB", 512 * 2**20),
        ("2GiB", 2**31),
        ("1.5g", 1_500_000_000),
        ("1 kib", 1024),
        (" 3 kB ", 3000),
        ("2Ti", 2**41),
        ("7b", 7),
    ],
)
def test_sizes_are_read(text: str, count: int) -> None:
    assert parse_bytes(text, "--x") == count


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1.2.3", "5 apples", "1e9", "0x10", "1 MiB 2"])
def test_other_texts_are_not_sizes(text: str) -> None:
    with pytest.raises(ConfigError, match="--x takes a number of bytes"):
        parse_bytes(text, "--x")


@steady
@given(st.integers(0, 2**53))
def test_a_shown_number_of_bytes_is_read_exactly(count: int) -> None:
    assert parse_bytes(str(count), "--x") == count


@steady
@given(st.integers(0, 2**45))
def test_a_shown_size_is_read_approximately(count: int) -> None:
    shown = format_bytes(count).replace("bytes", "b")
    assert parse_bytes(shown, "--x") == pytest.approx(count, rel=0.006)


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("block_size", "8", 8),
        ("start_timeout", "1e2", 100.0),
        ("engine_process", "Yes", True),
        ("engine_process", "off", False),
        ("device_memory", "2GiB", 2**31),
        ("dtype", "float16", "float16"),
        ("revision", "5", "5"),
        ("tensor_parallel_split", "2,1", (2, 1)),
        ("pipeline_layer_partition", "3,2,2", (3, 2, 2)),
        ("max_in_flight", "4", 4),
        ("cpu_cores", "auto", None),
        ("cpu_cores", "nobind", ()),
        ("cpu_cores", "0-2", ((0, 1, 2),)),
        ("cpu_cores", "0-1|2, 5", ((0, 1), (2, 5))),
    ],
)
def test_texts_are_read_by_the_type_of_their_option(name: str, text: str, value: object) -> None:
    assert KNOWN[name].read(text, "X") == value


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("block_size", "8.0", "X takes an integer, got '8.0'"),
        ("block_size", "0", "X must be at least 1, got 0"),
        ("start_timeout", "nan", "X takes a finite number"),
        ("engine_process", "2", "X takes true or false, got '2'"),
        ("dtype", "int8", "X must be one of auto"),
        ("device_memory", "lots", "X takes a number of bytes"),
        ("tensor_parallel_split", "2,x", "X takes positive integers"),
        ("cpu_cores", "0-", "X takes auto, nobind, or cores such as 0-3"),
        ("cpu_cores", "3-1", "X takes auto, nobind, or cores"),
        ("cpu_cores", "0|", "X takes auto, nobind, or cores"),
        ("cpu_cores", "0-99999", "X takes auto, nobind, or cores"),
        ("cpu_cores", "0-1|1", "X names a core twice"),
        ("tensor_parallel_split", "1_0,1", "X takes positive integers"),
        ("pipeline_layer_partition", "3,\u0662", "X takes positive integers"),
        ("block_size", "1_6", "X takes an integer, got '1_6'"),
        ("block_size", "\u0668", "X takes an integer"),
        ("start_timeout", "1_0.5", "X takes a number"),
        ("device_memory", "\u0662GiB", "X takes a number of bytes"),
    ],
)
def test_texts_of_the_wrong_type(name: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        KNOWN[name].read(text, "X")


@pytest.mark.parametrize("option", KNOWN.values(), ids=KNOWN)
def test_every_option_has_a_variable(option: Option, monkeypatch: pytest.MonkeyPatch) -> None:
    if option.default is None:
        return
    monkeypatch.setenv(f"SHOAL_{option.name.upper()}", str(option.default))
    assert from_environment(online=True)[option.name] == option.default
    assert strange_variables() == []


@pytest.mark.parametrize(
    "value", ['{"rope_theta": 5e5, "a": {"b": [1, null]}}', {"rope_theta": 5e5, "a": {"b": (1, None)}}]
)
def test_overrides_are_json(value: object) -> None:
    options = EngineOptions.from_flat("m", {"hf_overrides": value})
    assert options.model_options.hf_overrides == {"rope_theta": 5e5, "a": {"b": [1, None]}}


@pytest.mark.parametrize("value", ["[1]", "{", "{'a': 1}", 7, {"a": object()}, {"a": float("nan")}, '{"a": NaN}'])
def test_invalid_overrides(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^--hf-overrides.*JSON"):
        EngineOptions.from_flat("m", {"hf_overrides": value})
