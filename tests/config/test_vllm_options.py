"""vLLM's options that Shoal does not have: those that change nothing are accepted, the others explained."""

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM
from shoal.cli.commands import every_command
from shoal.config import engine_options, vllm_options
from shoal.errors import ConfigError
from shoal.launch.open_model import open_model
from support.commands import commands_here

SWITCHES = [each for each in vllm_options.TABLE if each.is_switch]
VALUES = [each for each in vllm_options.TABLE if not each.is_switch]


def taken(each: vllm_options.Accepted) -> list[Any]:
    """Return values that are accepted, as flags, config files and programs write them."""
    if each.is_switch:
        return [value == "true" for value in each.values]
    return [0, "4", 1.5] if each.values == vllm_options.ANY_NUMBER else list(each.values)


@pytest.mark.parametrize("each", vllm_options.TABLE, ids=lambda each: each.name)
def test_each_option_is_accepted_with_a_note_or_refused_with_an_alternative(each: vllm_options.Accepted) -> None:
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


def test_no_name_is_one_of_our_options() -> None:
    names = [each.name for each in vllm_options.TABLE]
    assert len(set(names)) == len(names)
    assert not set(names) & {option.name for option in engine_options.options()}
    for each in vllm_options.TABLE:
        assert each.note
        assert each.instead
        assert not each.needs or each.needs in {option.name for option in engine_options.options()}


@pytest.mark.parametrize("name", vllm_options.LACKING)
def test_each_missing_option_is_explained_in_every_form(name: str) -> None:
    flag = "--" + name.replace("_", "-")
    way = vllm_options.LACKING[name]
    told = f"Shoal does not have vLLM's {flag}" + (f": {way}" if way else " yet")
    for form in (name, name.upper(), flag, f"--no-{flag[2:]}", f"{flag}.key.of.json"):
        assert vllm_options.explain(form) == told
    with pytest.raises(ConfigError) as caught:
        engine_options.EngineOptions.from_flat(None, {name: 1})
    assert str(caught.value) == f"unknown option {name}: {told}"
    known = {option.name for option in engine_options.options()} | {each.name for each in vllm_options.TABLE}
    assert name not in known


def test_alternatives_name_existing_flags() -> None:
    known = {flag for command in every_command().values() for parameter in command.params for flag in parameter.opts}
    known |= {"--dir"}  # of `shoal download`
    for name, way in vllm_options.LACKING.items():
        for flag in re.findall(r"--[a-z][a-z-]+", way):
            assert flag in known, f"{name}: {flag}"
    for each in vllm_options.TABLE:
        for flag in re.findall(r"--[a-z][a-z-]+", each.note + each.instead):
            assert flag in known, f"{each.name}: {flag}"


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("max_logprobs", "--max-logprobs is a flag of `shoal serve` only"),
        ("disable_log_requests", "vLLM's --disable-log-requests is for `shoal serve` and AsyncLLM"),
        ("SWAP_SPACE", "vLLM's --swap-space changes nothing here: a preempted request is computed again"),
        ("-dcp", "Shoal does not have vLLM's --decode-context-parallel-size yet"),
    ],
)
def test_options_of_the_server_and_other_spellings_are_explained(name: str, says: str) -> None:
    assert str(vllm_options.explain(name)).startswith(says)


@pytest.mark.parametrize("name", ["xyzzy", "tensor_paralel_size", "-z", "", "--", "no_"])
def test_options_that_vllm_does_not_have_are_not_explained(name: str) -> None:
    assert vllm_options.explain(name) is None


def test_variables_of_vllm_options_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_ROPE_THETA", "1e6")
    monkeypatch.setenv("SHOAL_KV_TRANSFER_CONFIG", "{}")
    monkeypatch.setenv("SHOAL_SWAP_SPACE", "4")
    first, second, third = engine_options.strange_variables()
    assert first == (
        "the environment variable SHOAL_KV_TRANSFER_CONFIG is not read; "
        "Shoal does not have vLLM's --kv-transfer-config yet"
    )
    assert second.startswith("the environment variable SHOAL_ROPE_THETA is not read; Shoal does not have vLLM's")
    assert "--hf-overrides" in second
    assert "SHOAL_SWAP_SPACE is not read; vLLM's --swap-space changes nothing here" in third


def test_programs(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="shoal"):
        opened = open_model(None, {"enable_chunked_prefill": True, "swap_space": 4, "block_size": 8})
    assert opened.given == {"block_size": 8}
    assert "--enable-chunked-prefill changes nothing" in caplog.text
    with pytest.raises(ConfigError, match=r"--no-async-scheduling can't be obeyed: --max-in-flight 1"):
        LLM(async_scheduling=False)
    with pytest.raises(ConfigError, match=r"unknown option disable_log_requests: .* is for `shoal serve` and AsyncLLM"):
        LLM(disable_log_requests=True)
    with pytest.raises(ConfigError, match="--data-parallel-external-lb needs --data-parallel-rank"):
        open_model(None, {"data_parallel_external_lb": True}, online=True)


def test_code_in_the_folder_of_a_checkpoint_is_not_run(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """It is not run with the flag or without it; a known family does not need it."""
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--no-enable-chunked-prefill"], "--no-enable-chunked-prefill can't be obeyed"),
        (["--tokenizer-mode", "slow"], "--tokenizer-mode takes auto or hf here, got 'slow'"),
        (["--kv-cache-dtype", "fp8_inc"], "Invalid value for '--kv-cache-dtype': 'fp8_inc' is not one of 'auto'"),
        (["-q", "awq"], "--quantization awq: Shoal does not have this format of vLLM's yet: use --quantization int8"),
        (["--enable-log-requests"], "--enable-log-requests can't be obeyed: --uvicorn-log-level info"),
        (["--cpu-cores", "9999"], "names 9999, which this process"),
        (["--cpu-cores", "0-"], "--cpu-cores takes auto, nobind, or cores such as 0-3"),
        (["--rope-scaling", "x"], "Shoal does not have vLLM's --rope-scaling: use --hf-overrides"),
        (["--no-log-error-stack"], "Shoal does not have vLLM's --log-error-stack: leave it out"),
        (["--kv_transfer_config", "{}"], "Shoal does not have vLLM's --kv-transfer-config yet; see shoal serve --help"),
        (["-dcp", "2"], "Shoal does not have vLLM's --decode-context-parallel-size yet"),
        (["-O3"], "Shoal does not have vLLM's --optimization-level: leave it out"),
        (["--max-model-len", "0", "--swap-space", "4", "--disable-log-requests"], "--max-model-len must be at least 1"),
    ],
)
def test_flags(
    arguments: list[str], says: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with commands_here(monkeypatch) as shoal:
        assert shoal("serve", "--port", "0", *arguments) == 2
    assert says in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.slow
def test_flags_with_underscores_and_lists_of_origins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scripts for vLLM have such flags. Only the last one is refused."""
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
        with commands_here(monkeypatch) as shoal:
            assert shoal("serve", *arguments, *more) == 2
        assert says in capsys.readouterr().err


@pytest.mark.slow
def test_a_config_file_and_a_run(tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("enable-chunked-prefill: true\nswap-space: 4\ntokenizer_mode: auto\nmax-tokens: 2\n")
    program = [sys.executable, "-m", "shoal", "generate", "-p", "Hi", "--config", str(file)]
    found = subprocess.run([*program, "--trust-remote-code"], capture_output=True, text=True, timeout=300, check=False)
    assert found.returncode == 0, found.stderr
    for flag in ("--enable-chunked-prefill", "--swap-space", "--tokenizer-mode", "--trust-remote-code"):
        assert found.stderr.count(f"{flag} changes nothing") == 1, found.stderr
