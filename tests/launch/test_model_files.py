"""Model files that change while they are in use, and files that are pointers of Git LFS."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from shoal import LLM, SamplingParams
from shoal.engine.build import build_engine
from shoal.engine.process import start_engine
from shoal.errors import CheckpointError, UserError
from shoal.launch.hub import BUNDLED
from shoal.launch.open_model import open_model, open_served_model
from shoal.text.chat_template import ChatTemplate

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SMALL: dict[str, Any] = {"max_model_len": 64, "kv_cache_memory_bytes": "2MiB"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the bundled model. Its embedding is also its output head."""
    return Path(shutil.copytree(BUNDLED, tmp_path / "model"))


def copy_over(folder: Path) -> None:
    """Write other numbers into the same file, as `cp` does."""
    file = folder / "model.safetensors"
    with file.open("r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        stream.write(bytes(file.stat().st_size // 2))


def truncate(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 4096)


def replace(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "new")
    (folder / "new").rename(folder / "model.safetensors")


def rewrite(name: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_text((folder / name).read_text("utf-8") + "\n", "utf-8")

    return change


@pytest.mark.parametrize("change", [copy_over, truncate])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_running_engine_does_not_notice_changed_files(
    folder: Path, dtype: str, change: Callable[[Path], None]
) -> None:
    prompts: Any = [{"prompt_token_ids": [token, token + 1]} for token in range(300, 316)]
    with LLM(str(folder), dtype=dtype, enable_prefix_caching=False, **SMALL) as llm:
        before = [each.outputs[0].token_ids for each in llm.generate(prompts, GREEDY, use_tqdm=False)]
        change(folder)
        after = [each.outputs[0].token_ids for each in llm.generate(prompts, GREEDY, use_tqdm=False)]
    assert after == before


CHANGES = [copy_over, replace, rewrite("config.json"), rewrite("tokenizer.json"), rewrite("generation_config.json")]


@pytest.mark.parametrize("change", CHANGES)
def test_processes_that_start_later_refuse_changed_files(folder: Path, change: Callable[[Path], None]) -> None:
    """This holds for ranks, for an engine that is started again, and for API servers."""
    opened = open_model(str(folder), SMALL)
    open_served_model(str(folder), SMALL, opened.served)
    change(folder)
    with pytest.raises(UserError, match="has changed since Shoal first read it"):
        build_engine(opened.plan)
    with pytest.raises(UserError, match="has changed since Shoal first read it"):
        start_engine(opened.plan, None)
    with pytest.raises(CheckpointError, match="has changed since Shoal first read it"):
        open_served_model(str(folder), SMALL, opened.served)


def test_a_changed_draft_model_is_refused(folder: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(BUNDLED, tmp_path / "draft"))
    speculation = {"method": "draft_model", "model": str(other), "num_speculative_tokens": 2}
    opened = open_model(str(folder), {**SMALL, "speculative_config": speculation})
    copy_over(other)
    with pytest.raises(UserError, match=r"draft has changed since Shoal first read it"):
        build_engine(opened.plan)


def test_made_up_weights_have_no_files_that_could_change(folder: Path) -> None:
    opened = open_model(str(folder), {**SMALL, "load_format": "dummy"})
    copy_over(folder)
    build_engine(opened.plan).close()


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json", "model.safetensors"]
)
def test_a_git_lfs_pointer_in_place_of_a_file_is_refused(folder: Path, name: str) -> None:
    (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError) as caught:
        open_model(str(folder), SMALL)
    message = f"{folder / name} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {folder}, "
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize(
    "names",
    [
        ("model.safetensors.index.json",),
        ("pytorch_model.bin",),
        ("pytorch_model.bin.index.json",),
        ("tokenizer.model", "tokenizer.json"),
    ],
)
def test_a_pointer_in_place_of_other_kinds_of_files_is_refused(folder: Path, names: tuple[str, ...]) -> None:
    if names[0] != "tokenizer.model":
        (folder / "model.safetensors").unlink()
    for name in names:
        (folder / name).write_text(POINTER)
    with pytest.raises(CheckpointError, match="is a pointer of Git LFS"):
        open_model(str(folder), SMALL)


def test_pointers_in_place_of_unused_files_are_ignored(folder: Path) -> None:
    for name in ("pytorch_model.bin", "model.onnx", "vocab.txt"):
        (folder / name).write_text(POINTER)
    open_model(str(folder), SMALL)


def test_a_pointer_in_place_of_a_chat_template_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(POINTER)
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is a pointer of Git LFS"):
        ChatTemplate.open(folder)
    open_model(str(folder), SMALL)
