"""Mistakes of users: one line names the mistake and a way out, the exit code is 2, and nothing is started."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import pytest

from shoal.cli import main as cli_main
from shoal.config import engine_options
from shoal.config.option import Option
from shoal.llm import llm as llm_module
from support import checkpoints

Checkpoints = Callable[[str], Path]


class Refused(Protocol):
    def __call__(self, *arguments: object, command: str = "generate") -> str: ...


@pytest.fixture
def _as_it_was() -> Iterator[None]:
    """main() sets up a signal for a process of its own."""
    handler = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, handler)


@pytest.fixture
def refused(
    _as_it_was: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Refused:
    """Return a function that runs a command, which must be refused, and returns the line on stderr.

    The command (`shoal generate` by default) runs in this process. Starting an engine is an error.
    """

    def no_engine(*_: object, **__: object) -> None:
        raise AssertionError("an engine was started")

    monkeypatch.setattr(llm_module, "start_program", no_engine)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: object, command: str = "generate") -> str:
        monkeypatch.setattr(sys, "argv", ["shoal", command, *map(str, arguments)])
        capsys.readouterr()  # what fixtures have printed
        begun = time.monotonic()
        with pytest.raises(SystemExit) as ended:
            cli_main.main()
        assert time.monotonic() - begun < 10
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert ended.value.code == 2, err
        assert out == ""
        assert len(lines) == 1, err
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


Ran = Callable[..., tuple[int, str, str]]


@pytest.fixture
def ran(shoal: Callable[..., int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ran:
    """Return a function that runs `shoal generate` in this process, and returns exit code, stdout and stderr."""
    monkeypatch.setenv("SHOAL_LOG_LEVEL", "warning")

    def run(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        return shoal("generate", *arguments), *capsys.readouterr()

    return run


@pytest.fixture
def folder(checkpoint: Checkpoints, tmp_path: Path) -> Path:
    """A copy of a checkpoint, which tests may damage."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """A valid prompts file."""
    file = tmp_path / "tokens.jsonl"
    file.write_text('{"prompt_token_ids": [5, 6, 7]}\n')
    return file


def has(line: str, *parts: object) -> None:
    for part in parts:
        assert str(part) in line, f"{part!r} is not in: {line}"


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def rewrite_header(file: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


# --- the model ---------------------------------------------------------------------------------------------------


def test_folder_without_config(refused: Refused, folder: Path, tokens: Path) -> None:
    (folder / "config.json").unlink()
    has(refused(folder, "--prompts-file", tokens), folder, "has no config.json", "Hugging Face")


def test_folder_without_weights(refused: Refused, folder: Path, tokens: Path) -> None:
    (folder / "model.safetensors").unlink()
    has(refused(folder, "--prompts-file", tokens), folder, "no weights", "model.safetensors")


def test_file_instead_of_folder(refused: Refused, folder: Path, tokens: Path) -> None:
    has(refused(folder / "config.json", "--prompts-file", tokens), "is not a folder", "Hugging Face")


def test_missing_folder(refused: Refused, tmp_path: Path, tokens: Path) -> None:
    has(refused(tmp_path / "nowhere", "--prompts-file", tokens), tmp_path / "nowhere", "is not a folder")


def test_unknown_shape(refused: Refused, tokens: Path) -> None:
    has(refused("shape:nothing", "--prompts-file", tokens), "no shape 'nothing'", "llama-10m")


@pytest.mark.parametrize("architectures", [["T5ForConditionalGeneration"], [], None])
def test_unknown_architecture(refused: Refused, folder: Path, tokens: Path, architectures: list[str] | None) -> None:
    change_config(
        folder, architectures=architectures, model_type="t5"
    )  # model_type decides if no architecture is named
    line = refused(folder, "--prompts-file", tokens)
    has(line, "not supported", "LlamaForCausalLM", "Qwen3ForCausalLM", architectures[0] if architectures else "unnamed")


@pytest.mark.parametrize("architectures", ["LlamaForCausalLM", 7, [{}], [None]])
def test_architectures_that_are_not_a_list_of_names(
    refused: Refused, folder: Path, tokens: Path, architectures: object
) -> None:
    change_config(folder, architectures=architectures)
    has(refused(folder, "--prompts-file", tokens), "config.json", "architectures", "list of names")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"{", "can't be read"),
        (b"", "can't be read"),
        (b"\xff\xfe{}", "can't be read"),
        (b"[" * 100_000, "can't be read"),
        (b"[]", "not a JSON object"),
        (b"7", "not a JSON object"),
    ],
)
def test_broken_config(refused: Refused, folder: Path, tokens: Path, text: bytes, says: str) -> None:
    (folder / "config.json").write_bytes(text)
    has(refused(folder, "--prompts-file", tokens), folder / "config.json", says)


@pytest.mark.parametrize("value", [0, -4, "many", 1.5, True])
@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "intermediate_size",
        "vocab_size",
        "max_position_embeddings",
    ],
)
def test_sizes_in_config(refused: Refused, folder: Path, tokens: Path, key: str, value: object) -> None:
    change_config(folder, **{key: value})
    has(refused(folder, "--prompts-file", tokens), "config.json", key, "positive integer", repr(value))


def test_query_heads_that_kv_heads_do_not_divide(refused: Refused, folder: Path, tokens: Path) -> None:
    change_config(folder, num_key_value_heads=3)
    has(refused(folder, "--prompts-file", tokens), "8 attention heads", "3 KV heads")


def test_odd_head_size(refused: Refused, folder: Path) -> None:
    change_config(folder, head_dim=7)
    has(refused(folder, "--load-format", "dummy", "-p", "x"), "head", "even", "7")


def test_unknown_rope_scaling(refused: Refused, folder: Path, tokens: Path) -> None:
    change_config(folder, rope_parameters={"rope_type": "spiral", "rope_theta": 10000.0, "factor": 4.0})
    has(refused(folder, "--prompts-file", tokens), "'spiral'", "not supported", "llama3")


def test_unknown_dtype_of_checkpoint(refused: Refused, folder: Path, tokens: Path) -> None:
    change_config(folder, dtype="int8", torch_dtype="int8")
    has(refused(folder, "--prompts-file", tokens), "int8", "--dtype", "float32")


@pytest.mark.parametrize("size", [0, 5, 100, -1, -1000])
def test_truncated_weights(refused: Refused, folder: Path, tokens: Path, size: int) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:size])
    line = refused(folder, "--prompts-file", tokens)
    has(line, file, "truncated", f"{len(data[:size])} bytes")
    if size < 0:
        has(line, f"{len(data)} by its header", "download it again")


@pytest.mark.parametrize(
    "header", [b"{" * 50, b"[]", b'{"a": 5}', b"\xff" * 20, b"[" * 50_000, b'{"a": {"dtype": []}}']
)
def test_garbage_header(refused: Refused, folder: Path, tokens: Path, header: bytes) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    has(refused(folder, "--prompts-file", tokens), file, "malformed header")


def test_weights_that_are_a_folder(refused: Refused, folder: Path, tokens: Path) -> None:
    file = folder / "model.safetensors"
    file.unlink()
    file.mkdir()
    has(refused(folder, "--prompts-file", tokens), file, "can't be read", "directory")


def test_missing_tensor(refused: Refused, folder: Path, tokens: Path) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    rewrite_header(folder / "model.safetensors", lambda header: header.pop(name))
    has(refused(folder, "--prompts-file", tokens), "lacks the tensor", name, "[64, 112]")


def test_tensor_of_another_shape(refused: Refused, folder: Path, tokens: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    rewrite_header(folder / "model.safetensors", lambda header: header[name].update(shape=[64, 32]))
    has(refused(folder, "--prompts-file", tokens), name, "[64, 32]", "[32, 64]")


def test_tensor_of_a_type_that_can_not_be_loaded(refused: Refused, folder: Path, tokens: Path) -> None:
    name = "model.layers.2.self_attn.k_proj.weight"
    rewrite_header(folder / "model.safetensors", lambda header: header[name].update(dtype="I32"))
    has(refused(folder, "--prompts-file", tokens), name, "I32", "BF16")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = checkpoints.save("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="200KB")
    return folder


def test_missing_shard(refused: Refused, sharded: Path, tmp_path: Path, tokens: Path) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2
    shards[1].unlink()
    has(refused(folder, "--prompts-file", tokens), f"lacks 1 of {len(shards)} shards", shards[1].name)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 5}', '{"weight_map": {"a": 1}}', "[" * 100_000])
def test_broken_index(refused: Refused, sharded: Path, tmp_path: Path, tokens: Path, text: str) -> None:
    folder = Path(shutil.copytree(sharded, tmp_path / "model"))
    (folder / "model.safetensors.index.json").write_text(text)
    has(refused(folder, "--prompts-file", tokens), "model.safetensors.index.json", "can't be read")


# --- devices and memory ------------------------------------------------------------------------------------------


def test_device_memory_too_small_for_weights(refused: Refused) -> None:
    has(refused("--device-memory", "20MiB"), "20.00 MiB", "MiB too small for rank 0", "weights take", "--device-memory")


def test_device_memory_says_how_much_is_missing(refused: Refused, folder: Path, tokens: Path) -> None:
    line = refused(folder, "--prompts-file", tokens, "--device-memory", 1)
    needed = line.split(" too small")[0].split(" is ")[1]
    number, unit = needed.split()
    enough = int(float(number) * 2**20) + 5500  # the number is rounded to 2 digits; a block takes 12 KiB
    assert unit == "MiB"
    # With that much more there is room for the weights, but not for one block of the cache.
    has(refused(folder, "--prompts-file", tokens, "--device-memory", enough), "KV cache has room for")


def test_device_memory_too_small_for_one_request(refused: Refused) -> None:
    missing = refused("--device-memory", "20MiB").partition("20.00 MiB is ")[2].partition(" MiB too small")[0]
    enough = 20 + float(missing) + 1  # with 1 MiB for the cache: 256 tokens
    line = refused("--device-memory", f"{enough:.2f}MiB", "--max-model-len", 1024)
    has(line, "fewer than one request of --max-model-len 1024", "raise --device-memory")


def test_kv_cache_too_small(refused: Refused) -> None:
    line = refused("--kv-cache-memory-bytes", "128KiB", "--max-model-len", 256)
    has(
        line,
        "room for 32 tokens",
        "224 fewer",
        "--max-model-len 256",
        "raise --device-memory or --kv-cache-memory-bytes",
    )
    has(refused("--kv-cache-memory-bytes", 5), "room for 0 tokens", "--kv-cache-memory-bytes")


def test_more_ranks_than_devices(refused: Refused) -> None:
    line = refused("--num-devices", 2, "-tp", 3)
    has(line, "--tensor-parallel-size 3", "has 2", "--tensor-parallel-size 2", "or raise --num-devices")


def test_more_ranks_of_all_kinds_than_devices(refused: Refused) -> None:
    line = refused("--num-devices", 7, "-tp", 2, "-pp", 2, "-dp", 2)
    has(line, "--tensor-parallel-size 2 x --pipeline-parallel-size 2 x --data-parallel-size 2", "2 x 2 x 2 = 8")
    has(line, "has 7", "raise --num-devices")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-pp", 2, "--pipeline-layer-partition", "2,2"], "2,2 has 4 layers, but the model has 3"),
        (["-pp", 2, "--pipeline-layer-partition", "1,1,1"], "1,1,1 has 3 stages, but --pipeline-parallel-size is 2"),
        (["-pp", 2, "--pipeline-layer-partition", "3,0"], "--pipeline-layer-partition takes positive integers"),
        (["-pp", 4], "--pipeline-parallel-size 4 is more than the model's 3 layers"),
        (["--enable-expert-parallel"], "--enable-expert-parallel: a llama model has no experts to place"),
        (["-tp", 2, "--tensor-parallel-split", "2,0"], "--tensor-parallel-split takes positive integers"),
        (["-pp", 2, "--distributed-executor-backend", "uni"], "uni runs one rank, not 2: use mp or threads"),
        (["-dp", 2, "--distributed-executor-backend", "uni"], "uni runs one rank, not 2: use mp or threads"),
    ],
)
def test_impossible_layouts(refused: Refused, folder: Path, tokens: Path, arguments: list[object], says: str) -> None:
    """They are refused before the weights are read, which are broken here."""
    (folder / "model.safetensors").write_bytes(b"?")
    has(refused(folder, "--prompts-file", tokens, *arguments), says)


@pytest.mark.parametrize("variable", ["SHOAL_PIPELINE_LAYER_PARTITION", "VLLM_PP_LAYER_PARTITION"])
def test_a_partition_in_the_environment(refused: Refused, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "2,x")
    has(refused("-pp", 2), f"{variable} takes positive integers", "the number of layers of each stage")
    monkeypatch.setenv(variable, "2,3")
    has(refused("-pp", 2), "--pipeline-layer-partition 2,3 has 5 layers, but the model has 4")


def test_no_gpu(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    has(refused("--device", "cuda"), "CUDA", "use --device cpu")


def test_uni_runs_one_rank(refused: Refused) -> None:
    has(refused("-tp", 2, "--distributed-executor-backend", "uni"), "uni runs one rank, not 2", "mp or threads")


def test_max_model_len_beyond_the_model(refused: Refused) -> None:
    has(refused("--max-model-len", 1025), "--max-model-len 1025", "1024 positions", "lower it")


# --- flags -------------------------------------------------------------------------------------------------------

SIZES = [option for option in engine_options.options() if option.minimum is not None]


def _command_with(option: Option) -> str:
    return "serve" if option.online else "generate"


@pytest.mark.parametrize("option", SIZES, ids=lambda option: option.name)
def test_sizes_of_flags(refused: Refused, option: Option) -> None:
    assert option.minimum is not None
    for value in {option.minimum - 1, -1, -(10**12)}:
        line = refused(f"{option.flag}={value:.0f}", command=_command_with(option))
        has(line, option.flag, "takes a number of bytes" if option.bytes and value < 0 else "must be at least")


@pytest.mark.parametrize("value", ["0", "-0.5", "1.01"])
def test_memory_utilization(refused: Refused, value: str) -> None:
    has(refused(f"--gpu-memory-utilization={value}"), "--gpu-memory-utilization must be in (0, 1]")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
@pytest.mark.parametrize("flag", ["--gpu-memory-utilization", "--step-timeout"])
def test_flags_that_are_not_numbers(refused: Refused, flag: str, value: str) -> None:
    has(refused(f"{flag}={value}"), f"{flag} takes a finite number")


@pytest.mark.parametrize(
    "option",
    [option for option in engine_options.options() if option.type in {int, float} or option.choices],
    ids=lambda option: option.name,
)
def test_types_of_flags(refused: Refused, option: Option) -> None:
    command = _command_with(option)
    has(refused(f"{option.flag}=something", command=command), option.flag, "something", *option.choices)
    if option.type is int and not option.bytes:
        has(refused(f"{option.flag}=1.5", command=command), option.flag, "1.5")
    if not option.choices and not option.bytes:
        for value in ("1_0", " 5", "\u0665"):  # which Python reads
            has(refused(f"{option.flag}={value}", command=command), option.flag, value)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--tensor-parallel-sizes", "there is no flag --tensor-parallel-sizes (did you mean --tensor-parallel-size?)"),
        ("--temprature", "there is no flag --temprature (did you mean --temperature?)"),
        ("--max-seqs", "there is no flag --max-seqs (did you mean --max-num-seqs?)"),
        ("--tp", "there is no flag --tp (did you mean -tp?)"),
        ("--xyzzy", "there is no flag --xyzzy; see"),
        ("--block-chain", "there is no flag --block-chain; see"),
        ("-z", "there is no flag -z; see"),
        ("--speculative-model", "Shoal does not have vLLM's --speculative-model: use --speculative-config"),
        ("--max-logprobs", "--max-logprobs is a flag of `shoal serve` only: leave it out here"),
        ("--disable-log-requests", "vLLM's --disable-log-requests is for `shoal serve` and AsyncLLM"),
    ],
)
def test_unknown_flag(refused: Refused, flag: str, says: str) -> None:
    has(refused(flag, "2"), f"error: {says}", "see shoal generate --help")


@pytest.mark.parametrize("command", ["top", "scale", "download", "completion"])
def test_commands_without_an_engine_do_not_mention_vllm(refused: Refused, command: str) -> None:
    has(refused("--rope-theta", "2", command=command), "error: there is no flag --rope-theta; see")


def test_flag_without_value(refused: Refused) -> None:
    has(refused("--dtype"), "--dtype", "shoal generate --help")


def test_too_many_arguments(refused: Refused) -> None:
    has(refused("one", "two"), "two", "shoal generate --help")


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--temperature", "-0.1", "at least 0"),
        ("--temperature", "nan", "finite"),
        ("--temperature", "inf", "finite"),
        ("--top-p", "0", "(0, 1]"),
        ("--top-p", "-0.1", "(0, 1]"),
        ("--top-p", "1.1", "(0, 1]"),
        ("--top-p", "nan", "finite"),
        ("--top-k", "-2", "at least 1"),
        ("--max-tokens", "0", "at least 1"),
        ("--max-tokens", "-5", "at least 1"),
        ("--max-tokens", "x", "integer"),
        ("--temperature", "x", "float"),
        ("--sample-seed", "x", "integer"),
    ],
)
def test_sampling(refused: Refused, flag: str, value: str, says: str) -> None:
    name = flag if value == "x" else flag[2:].replace("-", "_")
    has(refused(f"{flag}={value}"), name, value, says)


# --- prompts and output ------------------------------------------------------------------------------------------


def test_no_prompts_with_a_model(refused: Refused, folder: Path) -> None:
    has(refused(folder), "no prompts", "-p", "--prompts-file")


def test_empty_prompts_file(refused: Refused, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n  \n")
    has(refused(folder, "--prompts-file", tmp_path / "empty"), "no prompts")


def test_empty_prompt(refused: Refused) -> None:
    has(refused("-p", ""), "prompt 0", "empty", "give some text")
    has(refused("-p", "fine", "-p", ""), "prompt 1", "empty")


def test_prompt_longer_than_the_context(refused: Refused) -> None:
    has(refused("-p", "37 + 45 = " * 1000), "prompt 0", "length is 1024 tokens", "shorten it or raise --max-model-len")
    has(refused("-p", "37 + 45 = " * 20, "--max-model-len", 16), "length is 16 tokens", "raise")


def test_prompt_that_is_not_unicode(refused: Refused) -> None:
    has(refused("-p", "broken \udcff bytes"), "prompt 0", "not valid Unicode", "character 7")


def test_text_prompt_without_tokenizer(refused: Refused, folder: Path) -> None:
    has(refused(folder, "-p", "hello"), "no tokenizer", "prompt_token_ids")


def test_broken_tokenizer(refused: Refused, folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    has(refused(folder, "-p", "hello"), folder / "tokenizer.json", "can't be read")


def test_tokenizer_of_another_model(refused: Refused, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(wordy_tokenizer({"hello": 5, "bye": 301}))
    has(refused(folder, "-p", "hello bye"), "prompt 0", "id 301", "vocabulary has 301", "tokenizer.json")


def wordy_tokenizer(vocabulary: dict[str, int]) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({**vocabulary, "?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return str(tokenizer.to_str())


def test_unreadable_prompts_file(refused: Refused, tmp_path: Path) -> None:
    has(refused("--prompts-file", tmp_path / "nowhere"), "--prompts-file", "nowhere", "can't be read", "No such file")
    has(refused("--prompts-file", tmp_path), "--prompts-file", tmp_path, "can't be read", "directory")
    (tmp_path / "latin").write_bytes(b'{"prompt": "caf\xe9"}\n')
    has(refused("--prompts-file", tmp_path / "latin"), tmp_path / "latin", "line 1", "UTF-8")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.jsonl", '{"prompt": "a"', "line 1: it is not JSON"),
        ("p.jsonl", "\n\nhello", "line 3: it is not JSON"),
        ("p.jsonl", '{"text": "a"}', "neither a text `prompt` nor a list `prompt_token_ids` nor `messages`"),
        ("p", '{"prompt": 7}', "`prompt` must be a string"),
        ("p.csv", "text\na\n", "no column 'prompt'"),
    ],
)
def test_prompts_file_whose_first_line_is_broken(
    refused: Refused, tmp_path: Path, name: str, content: str, says: str
) -> None:
    (tmp_path / name).write_text(content)
    has(refused("--prompts-file", tmp_path / name), tmp_path / name, says)


@pytest.mark.slow
def test_broken_lines_fail_alone(ran: Ran, tmp_path: Path) -> None:
    prompts, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    good = '{"prompt": "1 + 1 ="}'
    prompts.write_text(f'{good}\nhello\n{good[:-1]}, "sampling_params": {{"topp": 1}}}}\n{good}\n')
    code, out, err = ran("--prompts-file", prompts, "--output", output, *SMALL)
    assert (code, out) == (1, "")
    written = {line["index"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert [written[index].get("error") is not None for index in range(4)] == [False, True, True, False]
    broken, unknown = err.splitlines()
    has(broken, f"error: prompt 1 ({prompts}, line 2): it is not JSON", written[1]["error"])
    has(unknown, f"error: prompt 2 ({prompts}, line 3): unknown sampling parameter 'topp'; did you mean top_p?")


def test_output_that_is_not_empty(refused: Refused, tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.write_text("hours of work\n")
    has(refused("--output", output), output, "not empty", "--resume", "--overwrite")
    has(refused("--output", output, "--resume"), "line 1 was not written by `shoal generate`")
    has(refused("--output", output, "--resume", "--overwrite"), "--resume or --overwrite, not both")
    has(refused("--resume"), "--resume needs --output")
    has(refused("--overwrite"), "--overwrite needs --output")
    has(refused("--output", "/dev/null", "--resume"), "/dev/null is not a regular file")
    has(refused("--output", output, "--prompts-file", output, "--overwrite"), "the same file", output)
    assert output.read_text() == "hours of work\n"


def test_chat_without_a_template(refused: Refused, folder: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("hi\n")
    has(refused(folder, "--chat", "--prompts-file", tmp_path / "p.txt"), "no chat template")


def test_output_that_can_not_be_written(refused: Refused, tmp_path: Path) -> None:
    has(refused("--output", tmp_path / "no" / "out"), "--output", tmp_path / "no" / "out", "No such file")
    has(refused("--output", tmp_path), "--output", tmp_path, "directory")


# --- as processes ------------------------------------------------------------------------------------------------

_MAIN = """
import sys
seen = sys.argv.pop()
from shoal.cli.main import main
try:
    main()
finally:
    with open(seen, "w") as file:
        print("torch" in sys.modules, file=file)
"""


def workers_of(parent: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command, stat = (entry / "cmdline").read_bytes(), (entry / "stat").read_text()
            except OSError:
                continue
            if b"shoal.worker" in command and int(stat.rpartition(")")[2].split()[1]) == parent:
                found.append(int(entry.name))
    return found


def run_process(
    tmp_path: Path, *arguments: object, seconds: float = 20, environment: Mapping[str, str] | None = None
) -> tuple[int, str, str, bool]:
    """Run a command as a process. Return exit code, stdout, stderr, and whether torch was loaded. Fail if it starts a
    worker."""
    seen = tmp_path / "seen"
    command = [sys.executable, "-c", _MAIN, "generate", *map(str, arguments), str(seen)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "SHOAL_LOG_LEVEL": "warning", **(environment or {})},
    ) as process:
        try:
            deadline = time.monotonic() + seconds
            while process.poll() is None:
                assert not workers_of(process.pid)
                assert time.monotonic() < deadline, "it takes too long"
                time.sleep(0.01)
            out, err = process.communicate()
        finally:
            process.kill()
    return process.returncode, out, err, seen.read_text().strip() == "True"


def refused_process(tmp_path: Path, *arguments: object, **environment: str) -> str:
    code, out, err, torch_loaded = run_process(tmp_path, *arguments, environment=environment)
    assert code == 2, err
    assert out == ""
    assert len(err.splitlines()) == 1, err
    assert not torch_loaded
    return err


@pytest.mark.slow
def test_process_of_a_bad_folder(tmp_path: Path, folder: Path, tokens: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    has(refused_process(tmp_path, folder, "--prompts-file", tokens, "-tp", 2), file, "truncated")


@pytest.mark.slow
def test_process_of_a_bad_prompt(tmp_path: Path) -> None:
    has(refused_process(tmp_path, "-p", "", "-tp", 2), "prompt 0", "empty")


@pytest.mark.slow
def test_process_of_too_little_memory(tmp_path: Path) -> None:
    has(refused_process(tmp_path, "-tp", 2, "--device-memory", "1MiB"), "--device-memory", "too small for rank 0")


@pytest.mark.slow
def test_hub_offline(tmp_path: Path) -> None:
    line = refused_process(tmp_path, "nobody/nothing", "-p", "x", HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "hf"))
    has(line, "nobody/nothing", "HF_HUB_OFFLINE is set", "local folder")


@pytest.mark.slow
def test_hub_that_can_not_be_reached(tmp_path: Path) -> None:
    nowhere = "http://127.0.0.1:9"
    proxies = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), nowhere)
    proxies |= {name.upper(): nowhere for name in proxies} | {"no_proxy": "", "NO_PROXY": ""}
    environment = {
        **proxies,
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path / "hf"),
        "HF_ENDPOINT": "https://hub.invalid",
    }
    line = refused_process(tmp_path, "nobody/nothing", "-p", "x", **environment)
    has(line, "nobody/nothing", "hub cannot be reached", "local folder")


SMALL = ("--kv-cache-memory-bytes", "2MiB", "--max-model-len", 64, "--max-tokens", 3)


@pytest.mark.slow
def test_bad_prompts_in_a_file_fail_alone(ran: Ran, tmp_path: Path, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(wordy_tokenizer({"hello": 5, "bye": 6, "strange": 301}))
    bad: dict[int, tuple[dict[str, Any], str]] = {
        1: ({"prompt": ""}, "empty"),
        2: ({"prompt_token_ids": []}, "empty"),
        3: ({"prompt_token_ids": [1, 301]}, "301 is not a token id: the vocabulary has 301 tokens"),
        4: ({"prompt_token_ids": [-1]}, "-1 is not a token id"),
        5: ({"prompt_token_ids": [1.5]}, "1.5 is not a token id"),
        6: ({"prompt_token_ids": ["a"]}, "'a' is not a token id"),
        7: ({"prompt_token_ids": [3] * 64}, "has 64 tokens"),
        8: ({"prompt": "strange"}, "id 301"),
        9: ({"prompt": "half \ud800"}, "not valid Unicode"),
    }
    good: dict[int, dict[str, Any]] = {0: {"prompt_token_ids": [5, 6]}, 10: {"prompt": "hello\u2028bye"}}
    lines = [json.dumps(good.get(i) or bad[i][0]) for i in range(10)]
    file, output = tmp_path / "prompts.jsonl", tmp_path / "out.jsonl"
    last = json.dumps(good[10], ensure_ascii=False)  # with a line separator that does not end a JSON line
    file.write_text("\n".join([*lines, last]), encoding="utf-8")
    code, out, err = ran(folder, "--prompts-file", file, "--output", output, *SMALL)
    assert code == 1, err
    assert out == ""
    written = {line["index"]: line for line in map(json.loads, output.read_text("utf-8").split("\n")[:-1])}
    assert sorted(written) == list(range(11))
    for index in good:
        assert "error" not in written[index]
        assert len(written[index]["outputs"][0]["token_ids"]) in range(1, 4)
    assert written[10]["prompt"] == good[10]["prompt"]
    told = err.splitlines()
    assert len(told) == len(bad), err
    for (index, (prompt, says)), line in zip(bad.items(), told, strict=True):
        assert says in written[index]["error"]
        assert written[index]["outputs"] == []
        assert written[index]["prompt"] == prompt.get("prompt")
        assert written[index]["prompt_token_ids"] == prompt.get("prompt_token_ids", [])
        assert line.startswith(f"error: prompt {index} ({file}, line {index + 1}): ")
        assert says in line


@pytest.mark.slow
def test_prompt_that_does_not_fit_into_memory(tmp_path: Path) -> None:
    """How much fits is known only after the start. The error is the same, before anything is generated."""
    arguments = ("-p", "fine", "-p", "37 + 45 = " * 80, "--kv-cache-memory-bytes", "1MiB")
    code, out, err, _ = run_process(tmp_path, *arguments, seconds=60)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1, err
    has(err, "error: prompt 1", "length is 256 tokens", "raise --max-model-len")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk(ran: Ran) -> None:
    code, out, err = ran("-p", "1 + 1 =", "--output", "/dev/full", *SMALL)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    has(err, "error: --output /dev/full can't be written", "No space left")
