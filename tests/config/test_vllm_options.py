"""vLLM's options for which there is nothing to set: taken where they say how things are, refused where they don't."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM
from shoal.config import engine_options, vllm_options
from shoal.errors import ConfigError
from shoal.launch.open_model import open_model

SWITCHES = [each for each in vllm_options.TABLE if each.is_switch]
VALUES = [each for each in vllm_options.TABLE if not each.is_switch]


def taken(each: vllm_options.Accepted) -> list[Any]:
    """Values that it takes, as flags, config files and programs write them."""
    if each.is_switch:
        return [value == "true" for value in each.values]
    return [0, "4", 1.5] if each.values == vllm_options.ANY_NUMBER else list(each.values)


@pytest.mark.parametrize("each", vllm_options.TABLE, ids=lambda each: each.name)
def test_each_is_taken_with_a_note_or_refused_with_a_way_out(each: vllm_options.Accepted) -> None:
    others = {each.needs: 0} if each.needs else {}
    for value in taken(each):
        left, (note,) = vllm_options.take({each.name: value, "seed": 3, **others}, server=True)
        assert left == {"seed": 3, **others}
        assert note == f"{each.flag} changes nothing: {each.note}"
    for value in (True, False, "xyzzy", "-1", None, [1], 10**400, float("nan")):
        if value in taken(each) or (each.is_switch and str(value).lower() in each.values):
            continue
        if value is None:
            assert vllm_options.take({each.name: value}, server=True) == ({}, [])
            continue
        with pytest.raises(ConfigError) as caught:
            each.check(value)
        assert each.flag.removeprefix("--") in str(caught.value)
        assert "\n" not in str(caught.value)


def test_no_name_is_one_of_ours() -> None:
    names = [each.name for each in vllm_options.TABLE]
    assert len(set(names)) == len(names)
    assert not set(names) & {option.name for option in engine_options.options()}
    for each in vllm_options.TABLE:
        assert each.note
        assert each.instead
        assert not each.needs or each.needs in {option.name for option in engine_options.options()}


def test_programs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="shoal"):
        opened = open_model(None, {"enable_chunked_prefill": True, "swap_space": 4, "block_size": 8})
    assert opened.given == {"block_size": 8}
    assert "--enable-chunked-prefill changes nothing" in caplog.text
    with pytest.raises(ConfigError, match=r"--no-async-scheduling can't be obeyed: --max-in-flight 1"):
        LLM(async_scheduling=False)
    with pytest.raises(ConfigError, match="unknown option disable_log_requests"):
        LLM(disable_log_requests=True)
    with pytest.raises(ConfigError, match="--data-parallel-external-lb needs --data-parallel-rank"):
        open_model(None, {"data_parallel_external_lb": True}, online=True)


def test_code_beside_a_checkpoint_is_not_run(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """With the flag as without it; a known family needs none of it."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        '{"model_type": "strange", "architectures": ["StrangeForCausalLM"], "auto_map": {"AutoConfig": "strange.C"}}'
    )
    (folder / "strange.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w')\n")
    with pytest.raises(Exception, match="code of its own \\(auto_map\\), which is never run"):
        open_model(str(folder), {"trust_remote_code": True, "load_format": "dummy"})
    assert not (tmp_path / "was run").exists()
    assert open_model(str(checkpoint("llama")), {"trust_remote_code": True}).given == {}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--no-enable-chunked-prefill"], "--no-enable-chunked-prefill can't be obeyed"),
        (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype takes auto here, got 'fp8'"),
        (["--quantization", "awq"], "--quantization can't be obeyed, got 'awq': leave it out"),
        (["--enable-log-requests"], "--enable-log-requests can't be obeyed: --uvicorn-log-level info"),
        (["--cpu-cores", "9999"], "names 9999, which this process"),
        (["--cpu-cores", "0-"], "--cpu-cores takes auto, nobind, or cores such as 0-3"),
        (["--max-model-len", "0", "--swap-space", "4", "--disable-log-requests"], "--max-model-len must be at least 1"),
    ],
)
def test_flags(arguments: list[str], says: str) -> None:
    program = [sys.executable, "-m", "shoal", "serve", "--port", "0", *arguments]
    found = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)
    assert found.returncode == 2, found.stderr
    assert says in found.stderr.splitlines()[-1]


def test_flags_with_underscores_and_lists_of_origins() -> None:
    """As they stand in other people's scripts; the last one is what is refused."""
    arguments = [
        "--gpu_memory_utilization",
        "0.5",
        "--dtype",
        "half",
        "--allowed_origins",
        '["*"]',
        "--max_num_seqs",
        "0",
    ]
    for more, says in (
        ([], "--max-num-seqs must be at least 1"),
        (["--allowed-origins", "[5]"], "a JSON list of them"),
    ):
        program = [sys.executable, "-m", "shoal", "serve", *arguments, *more]
        found = subprocess.run(program, capture_output=True, text=True, timeout=100, check=False)
        assert (found.returncode, says in found.stderr) == (2, True), found.stderr


def test_a_config_file_and_a_run(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("enable-chunked-prefill: true\nswap-space: 4\nkv_cache_dtype: auto\nmax-tokens: 2\n")
    program = [sys.executable, "-m", "shoal", "generate", "-p", "Hi", "--config", str(file)]
    found = subprocess.run([*program, "--trust-remote-code"], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    for flag in ("--enable-chunked-prefill", "--swap-space", "--kv-cache-dtype", "--trust-remote-code"):
        assert found.stderr.count(f"{flag} changes nothing") == 1, found.stderr
