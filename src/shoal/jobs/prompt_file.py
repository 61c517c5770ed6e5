"""Prompts from files. One line is read at a time, so that a file of any size takes little memory.

A line that can't be used becomes an entry with an `error`, so that only this prompt fails. A file that can't be used at
all (it can't be opened, has no such column, its first line is broken) is a `UserError` before anything is started.
"""

import csv
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, Literal

from shoal.config.option import nearest
from shoal.errors import RequestError, UserError
from shoal.jobs import entries, openai_batch
from shoal.jobs.entries import JobEntry

Format = Literal["text", "jsonl", "csv", "tsv"]
_SUFFIXES: dict[str, Format] = {
    ".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".csv": "csv", ".tsv": "tsv",
}  # fmt: skip
_COUNTED_BYTES = 1 << 30  # a larger file is not read twice just to count its prompts for a progress bar
_LONGEST_FIELD = 2**31 - 1
_BOM = b"\xef\xbb\xbf"


class PromptFile:
    """The prompts of a file, which can be iterated over."""

    def __init__(self, path: str | Path, *, column: str = "prompt", chat: bool = False, first_index: int = 0) -> None:
        """Check the start of the file.

        Args:
            path: the file; `-`: stdin.
            column: the column of a CSV file that has the prompts.
            chat: make each text a user's message.
            first_index: the index of the first prompt.

        Raises:
            UserError: the file can't be read, has no such column, or its first line is broken.
        """
        self._stdin = str(path) == "-"
        self.name = "stdin" if self._stdin else str(path)
        self._path = Path(path)
        self._column = column
        self._chat = chat
        self._first_index = first_index
        self.rereadable = not self._stdin and os.path.isfile(self._path)
        self._once: Iterator[JobEntry] = iter(()) if self.rereadable else self._read()
        self.empty = self._check_start()

    def __iter__(self) -> Iterator[JobEntry]:
        """Return an iterator from the start. If the file can be read only once, like stdin, all calls share one."""
        return self._read() if self.rereadable else self._once

    def count(self) -> int | None:
        """Return the number of entries; None if counting takes too long or is not possible."""
        if not self.rereadable or self._path.stat().st_size > _COUNTED_BYTES:
            return None
        with self._open() as file:
            if self._format(b"") in ("csv", "tsv"):
                return sum(1 for _ in self._read())
            first = file.readline().removeprefix(_BOM)
            return bool(first.strip()) + sum(1 for line in file if line.strip())

    def _check_start(self) -> bool:
        entries_ = self._read() if self.rereadable else self._once
        first = next(entries_, None)
        if first is not None and first.error is not None:
            raise UserError(f"{first.where}: {first.error}")
        if not self.rereadable and first is not None:
            self._once = itertools.chain([first], self._once)
        return first is None

    def _open(self) -> IO[bytes]:
        try:
            return open(sys.stdin.fileno(), "rb", closefd=False) if self._stdin else self._path.open("rb")
        except OSError as error:
            raise UserError(f"--prompts-file {self.name} can't be read: {error.strerror}") from None

    def _read(self) -> Iterator[JobEntry]:
        with self._open() as file:
            lines = _Lines(file, self.name)
            kind = self._format(lines.peek())
            if kind in ("csv", "tsv"):
                yield from self._rows(lines, "\t" if kind == "tsv" else ",")
            else:
                yield from self._lines(lines, self._json if kind == "jsonl" else self._text)

    def _format(self, first: bytes) -> Format:
        """Return the format by the file's name, or by its first line if the name does not say it."""
        return _SUFFIXES.get(self._path.suffix.lower()) or ("jsonl" if first.lstrip()[:1] == b"{" else "text")

    def _lines(self, lines: "_Lines", parse: Callable[[int, str, bytes], JobEntry]) -> Iterator[JobEntry]:
        index = itertools.count(self._first_index)
        for number, line in lines:
            if line.strip():
                yield _parse_or_error(parse, next(index), f"{self.name}, line {number}", line)

    def _json(self, index: int, where: str, raw: bytes) -> JobEntry:
        _check_unicode(raw)
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"it is not JSON: {error}") from None
        request = openai_batch.is_request(line)
        try:
            if request:
                return openai_batch.parse_request(index, where, line)
            return self._as_chat(entries.parse_line(index, where, line))
        except RequestError as error:
            refused_entry = openai_batch.refused_entry if request else entries.refused_entry
            return refused_entry(index, where, line, str(error))

    def _text(self, index: int, where: str, raw: bytes) -> JobEntry:
        _check_unicode(raw)
        return self._as_chat(JobEntry(index, where, prompt=raw.decode().rstrip("\r\n")))

    def _as_chat(self, entry: JobEntry) -> JobEntry:
        return as_chat(entry) if self._chat else entry

    def _rows(self, lines: "_Lines", delimiter: str) -> Iterator[JobEntry]:
        csv.field_size_limit(_LONGEST_FIELD)
        texts = (line.decode("utf-8", "surrogateescape") for _, line in lines)
        rows = csv.reader(texts, delimiter=delimiter, strict=True)
        header = self._header(lines, rows, delimiter)
        index = itertools.count(self._first_index)
        while True:
            where = f"{self.name}, line {lines.number + 1}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield JobEntry(next(index), where, error=f"it is not a row of CSV: {error}")
                continue
            if row:
                yield _parse_or_error(self._row, next(index), where, header, row)

    def _header(self, lines: "_Lines", rows: Iterator[list[str]], delimiter: str) -> list[str]:
        """Return the first row that is not blank.

        Raises:
            UserError: it is not a row of CSV, or has no such column.
        """
        try:
            header = next((row for row in rows if any(cell.strip() for cell in row)), [])
        except csv.Error as error:
            raise UserError(f"{self.name}, line {lines.number}: it is not a row of CSV: {error}") from None
        if header and self._column not in header:
            hint = _other_delimiter(self._column, header, delimiter) or nearest(self._column, header)
            raise UserError(f"{self.name} has no column {self._column!r}{hint}")
        return header

    def _row(self, index: int, where: str, header: list[str], row: list[str]) -> JobEntry:
        if len(row) != len(header):
            raise RequestError(f"it has {len(row)} columns, the header has {len(header)}")
        values = dict(zip(header, row, strict=True))
        text = values[self._column]
        try:
            _check_unicode(text.encode("utf-8", "surrogateescape"))
        except RequestError as error:
            return entries.refused_entry(index, where, values, str(error))
        return self._as_chat(JobEntry(index, where, prompt=text, ids=entries.find_ids(values)))


def as_chat(entry: JobEntry) -> JobEntry:
    """Return the entry with its text as a user's message."""
    if entry.text is None:
        return entry
    messages = [{"role": "user", "content": entry.text}]
    return JobEntry(entry.index, entry.where, messages=messages, sampling=entry.sampling, ids=entry.ids)


def _other_delimiter(column: str, header: list[str], delimiter: str) -> str:
    """Return a hint if the header has the column when it is split at another delimiter; else ""."""
    for other in ";\t,|":
        if len(header) == 1 and column in (name.strip(' "') for name in header[0].split(other)):
            return f": its columns are separated by {other!r}, but a file with this name must use {delimiter!r}"
    return ""


class _Lines(Iterator[tuple[int, bytes]]):
    """The lines of a file with their numbers, from 1 on. The first line can be read ahead.

    Only \\n ends a line, since JSON texts may contain other line separators.
    """

    def __init__(self, file: IO[bytes], name: str) -> None:
        self._file = file
        self._name = name
        self._ahead: bytes | None = None
        self.number = 0

    def peek(self) -> bytes:
        if self._ahead is None:
            self._ahead = self._next().removeprefix(_BOM)
        return self._ahead

    def __next__(self) -> tuple[int, bytes]:
        line, self._ahead = self._next() if self._ahead is None else self._ahead, None
        if not line:
            raise StopIteration
        self.number += 1
        return self.number, line

    def _next(self) -> bytes:
        try:
            return self._file.readline()
        except OSError as error:
            raise UserError(f"--prompts-file {self._name} can't be read: {error.strerror}") from None


def _parse_or_error(parse: Callable[..., JobEntry], index: int, where: str, *raw: Any) -> JobEntry:
    """Return the entry of a line, or an entry with the error if the line can't be used."""
    try:
        return parse(index, where, *raw)
    except RequestError as error:
        return JobEntry(index, where, error=str(error))


def _check_unicode(line: bytes) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise RequestError(f"it is not UTF-8: {error.reason} at byte {error.start}") from None
