"""Prompts from files of every format. A broken line fails alone."""

import csv
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.jobs.entries import JobEntry
from shoal.jobs.output_lines import failed_line
from shoal.jobs.prompt_file import PromptFile
from support.fakes import steady

# A line may contain anything but line breaks and halves of surrogate pairs, which UTF-8 can't encode.
lines = st.text(st.characters(blacklist_categories=["Cs"], blacklist_characters="\r\n"), min_size=1, max_size=20)
texts = lines.filter(lambda text: text.strip() and text.encode().strip() and text[0] != "\ufeff")


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path: Path, **options: Any) -> list[JobEntry]:
    file = PromptFile(path, **options)
    found = list(file)
    assert [entry.index for entry in found] == list(
        range(options.get("first_index", 0), options.get("first_index", 0) + len(found))
    )
    assert list(file) == found, "a second reading gives the same"
    assert file.count() == len(found)
    assert file.empty == (not found)
    return found


@steady
@given(st.lists(texts), st.sampled_from(["\n", "\r\n", "\n\n  \n"]), st.booleans())
def test_a_text_file_has_one_prompt_per_line(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[str], end: str, ended: bool
) -> None:
    content = end.join(prompts) + (end if ended else "")
    path = write(tmp_path_factory.mktemp("text"), "p.txt", content)
    assert [entry.text for entry in read(path)] == prompts


@steady
@given(st.lists(st.one_of(st.text(max_size=20), st.lists(st.integers(0, 99)))), st.booleans())
def test_json_lines_give_texts_and_tokens(
    tmp_path_factory: pytest.TempPathFactory, prompts: list[Any], escaped: bool
) -> None:
    written = [
        json.dumps({"prompt" if isinstance(p, str) else "prompt_token_ids": p}, ensure_ascii=escaped or not plain(p))
        for p in prompts
    ]
    path = write(tmp_path_factory.mktemp("json"), "p.jsonl", "\n".join(written))
    assert [
        entry.text if isinstance(p, str) else entry.tokens for entry, p in zip(read(path), prompts, strict=True)
    ] == (prompts)


def plain(prompt: Any) -> bool:
    return not isinstance(prompt, str) or not any("\ud800" <= c <= "\udfff" for c in prompt)


@steady
@given(st.lists(st.tuples(st.text(st.characters(blacklist_categories=["Cs"]), max_size=9), texts)), st.booleans())
def test_a_csv_column_gives_prompts(
    tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, str]], tabs: bool
) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter="\t" if tabs else ",", quoting=csv.QUOTE_ALL)
    writer.writerows([("text", "q"), *rows])
    path = write(tmp_path_factory.mktemp("csv"), "p.tsv" if tabs else "p.csv", text.getvalue())
    assert [entry.text for entry in read(path, column="q")] == [prompt for _, prompt in rows]
    assert [entry.text for entry in read(path, column="text", first_index=3)] == [text for text, _ in rows]


@steady
@given(st.binary(max_size=200), st.sampled_from(["p.jsonl", "p.txt", "p.csv", "p"]))
def test_any_bytes_can_be_read(tmp_path_factory: pytest.TempPathFactory, content: bytes, name: str) -> None:
    head = {"p.csv": b"prompt\na\n", "p.jsonl": b'{"prompt": "a"}\n'}.get(name, b"a\n")
    path = write(tmp_path_factory.mktemp("any"), name, head + content)
    for entry in read(path):
        assert (entry.error is None) != (entry.prompt is None and entry.messages is None)


def test_an_entry_has_the_parameters_and_ids_of_its_line(tmp_path: Path) -> None:
    line = {"prompt": "a", "custom_id": "x", "id": 7, "sampling_params": {"n": 2}, "label": 3}
    (entry,) = read(write(tmp_path, "p.jsonl", json.dumps(line)))
    assert entry == JobEntry(0, f"{tmp_path}/p.jsonl, line 1", "a", sampling={"n": 2}, ids={"custom_id": "x", "id": 7})


def test_messages_and_chat(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "hi"}]
    path = write(tmp_path, "p.jsonl", "\n".join(json.dumps(line) for line in [{"messages": talk}, {"prompt": "hi"}]))
    assert [entry.messages for entry in read(path)] == [talk, None]
    assert [entry.messages for entry in read(path, chat=True)] == [talk, talk]
    assert [entry.messages for entry in read(write(tmp_path, "p.txt", "hi\n"), chat=True)] == [talk]


def test_the_first_line_decides_the_format_if_the_name_does_not(tmp_path: Path) -> None:
    assert [entry.text for entry in read(write(tmp_path, "one", '{"prompt": "a"}\n'))] == ["a"]
    assert [entry.text for entry in read(write(tmp_path, "two", "a\nb\n"))] == ["a", "b"]
    assert [entry.text for entry in read(write(tmp_path, "bom.txt", b"\xef\xbb\xbfa\nb"))] == ["a", "b"]
    assert [entry.text for entry in read(write(tmp_path, "blank.txt", b"\xef\xbb\xbf\nb"))] == ["b"]


BROKEN = [
    ('{"prompt": "a"', "is not JSON"),
    ("hello", "is not JSON"),
    ("[" * 100_000, "is not JSON"),
    ("{}", "`prompt_token_ids`"),
    ("7", "JSON object"),
    ('["a"]', "JSON object"),
    ('{"prompt": 7}', "`prompt` must be a string"),
    ('{"prompt_token_ids": "abc"}', "`prompt_token_ids` must be a list"),
    ('{"text": "a"}', "neither a text `prompt`"),
    ('{"messages": []}', "`messages` must be a list"),
    ('{"messages": ["hi"]}', "`messages` must be a list"),
    ('{"messages": [{}], "prompt": "a"}', "give one of them"),
    ('{"prompt": "a", "prompt_token_ids": [1]}', "has `prompt` and `prompt_token_ids`: give one"),
    ('{"prompt": "a", "sampling_params": 3}', "`sampling_params` must be"),
    (b'{"prompt": "caf\xe9"}', "not UTF-8"),
]


@pytest.mark.parametrize(("line", "says"), BROKEN)
def test_a_broken_line_fails_alone(tmp_path: Path, line: str | bytes, says: str) -> None:
    line = line if isinstance(line, bytes) else line.encode()
    path = write(tmp_path, "p.jsonl", b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "b"}\n')
    first, broken, last = read(path)
    assert (first.text, last.text) == ("a", "b")
    assert broken.where == f"{path}, line 3"
    assert broken.error is not None
    assert says in broken.error
    assert "\n" not in broken.error
    assert len(broken.error) < 300


@pytest.mark.parametrize(("line", "says"), BROKEN)
def test_a_broken_first_line_is_refused(tmp_path: Path, line: str | bytes, says: str) -> None:
    path = write(tmp_path, "p.jsonl", line)
    with pytest.raises(UserError, match="line 1: ") as refused:
        PromptFile(path)
    assert says in str(refused.value)


def test_a_broken_csv_row_fails_alone(tmp_path: Path) -> None:
    content = b'prompt,custom_id\na,1\nonly\n"q"x,2\n"two\nlines",3\n\xff,4\n\nb,5\n,6\n'
    found = read(write(tmp_path, "p.csv", content))
    assert [entry.text for entry in found] == ["a", None, None, "two\nlines", None, "b", ""]
    assert [entry.ids.get("custom_id") for entry in found] == ["1", None, None, "3", "4", "5", "6"]
    errors = [entry.error for entry in found if entry.error]
    assert (found[1].where, found[4].where) == (f"{tmp_path}/p.csv, line 3", f"{tmp_path}/p.csv, line 7")
    for error, says in zip(errors, ["has 1 columns", "not a row of CSV", "not UTF-8"], strict=True):
        assert says in error


def test_a_csv_file_without_the_column(tmp_path: Path) -> None:
    path = write(tmp_path, "p.csv", "id,promt\n1,a\n")
    with pytest.raises(UserError, match="no column 'prompt'; did you mean promt"):
        PromptFile(path)
    with pytest.raises(UserError, match="no column 'xyzzy'; known are id, promt"):
        PromptFile(path, column="xyzzy")


def test_a_csv_file_with_another_delimiter(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'prompt': its columns are separated by ';', but .* must use ','"):
        PromptFile(write(tmp_path, "p.csv", "id;prompt\n1;a\n"))
    with pytest.raises(UserError, match=r"separated by ',', but .* must use '\\t'"):
        PromptFile(write(tmp_path, "p.tsv", "id,prompt\n1,a\n"))


@pytest.mark.parametrize("blank", ["\n", "\r\n\n", "  \n", ",\n", "\ufeff\n"])
def test_a_csv_file_whose_first_line_is_blank(tmp_path: Path, blank: str) -> None:
    found = read(write(tmp_path, "p.csv", blank + "id,prompt\n1,a\n"))
    assert [(entry.text, entry.ids) for entry in found] == [("a", {"id": "1"})]
    path = write(tmp_path, "q.csv", blank + '"id"x,prompt\n')
    with pytest.raises(UserError, match=f"line {blank.count(chr(10)) + 1}: it is not a row of CSV"):
        PromptFile(path)


def test_a_refused_line_keeps_its_ids(tmp_path: Path) -> None:
    content = '{"prompt": "a"}\n{"prompt": 7, "custom_id": "x", "id": 3}\n'
    _, refused = read(write(tmp_path, "p.jsonl", content))
    assert refused.error is not None
    answer = failed_line(refused, "why")
    assert (answer["index"], answer["custom_id"], answer["id"], answer["error"]) == (1, "x", 3, "why")


def test_files_that_can_not_be_read(tmp_path: Path) -> None:
    for path, says in [(tmp_path, "directory"), (tmp_path / "no", "No such file")]:
        with pytest.raises(UserError, match=f"can't be read: .*{says}"):
            PromptFile(path)


@pytest.mark.parametrize("content", ["", "\n  \n"])
@pytest.mark.parametrize("name", ["p.txt", "p.jsonl", "p"])
def test_empty_files(tmp_path: Path, name: str, content: str) -> None:
    assert read(write(tmp_path, name, content)) == []
    assert read(write(tmp_path, "p.csv", "prompt\n")) == []
    assert read(write(tmp_path, "q.csv", "")) == []


def test_a_pipe_is_read_once_and_lazily(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    with open(writing, "w") as pipe:
        pipe.write("a\nb\n")
        pipe.flush()
        file = PromptFile(f"/dev/fd/{reading}")
        assert (file.rereadable, file.count(), file.empty) == (False, None, False)
        found = list(itertools.islice(file, 2))  # the other end is still open
        pipe.write("c\n")
    os.close(reading)
    assert [entry.text for entry in [*found, *file]] == ["a", "b", "c"]
    assert [entry.index for entry in found] == [0, 1]
