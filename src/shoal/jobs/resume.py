"""`--resume`: which prompts an output file has answered, and whether these are the prompts of the job.

A line is an answer if it is complete (a line break ends it), has an `index` and a `digest`, and no `error`. Lines with
an error are removed, so that their prompts run again. The rest after the last line break is removed if it begins like a
line of ours.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from shoal.errors import RequestError, UserError
from shoal.jobs.entries import JobEntry, digest, same_prompt
from shoal.jobs.output_file import OutputFile
from shoal.jobs.parameters import JobParameters

_PAGE = 4096
_BEGINNINGS = (b'{"index": ', b'{"id": "batch_req-')  # of a line in our format, and in OpenAI's batch format


class AnsweredPrompts:
    """The prompts that an output file has answered. It takes eight bytes for each index, however long the lines are."""

    def __init__(self) -> None:
        self._pages: dict[int, array[int]] = {}
        self.count = 0
        self.largest_index = -1
        self.complete_bytes = 0  # bytes of complete lines
        self.dropped = 0  # lines with an error, and second answers

    def add(self, index: int, found: str) -> None:
        page = self._pages.setdefault(index // _PAGE, array("Q", bytes(8 * _PAGE)))
        if page[index % _PAGE]:
            self.dropped += 1
            return
        page[index % _PAGE] = _number(found)
        self.count += 1
        self.largest_index = max(self.largest_index, index)

    @property
    def held_bytes(self) -> int:
        """The number of bytes that the indices take in memory."""
        return sum(len(page) * page.itemsize for page in self._pages.values())

    def __contains__(self, index: int) -> bool:
        page = self._pages.get(index // _PAGE)
        return page is not None and page[index % _PAGE] != 0

    def has(self, index: int, wanted: str) -> bool:
        """Return whether the answer with this index has the digest `wanted`."""
        page = self._pages.get(index // _PAGE)
        return page is not None and page[index % _PAGE] == _number(wanted)


def _number(text: str) -> int:
    return int(text, 16) or 1  # 0 means that there is no answer


def scan_answers(output: OutputFile) -> AnsweredPrompts:
    """Read the answers of an output file.

    Raises:
        UserError: a line, or the beginning of an incomplete last line, was not written by `shoal generate`.
    """
    answered = AnsweredPrompts()
    for number, line in enumerate(output.lines(), 1):
        if not line.endswith(b"\n"):
            if not any(line.startswith(own) or own.startswith(line) for own in _BEGINNINGS):
                raise _foreign(output, number)
            break
        answered.complete_bytes += len(line)
        index, found = _read(output, number, line)
        if found is None:
            answered.dropped += 1
        else:
            answered.add(index, found)
    return answered


def _read(output: OutputFile, number: int, line: bytes) -> tuple[int, str | None]:
    """Return the index and the digest of a line; the digest is None if the line has an error."""
    try:
        values = json.loads(line)
        index, failed = values["index"], values.get("error") is not None
        found = None if failed else f"{int(values['digest'], 16):016x}"
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        index, found = -1, None
    if isinstance(index, bool) or not isinstance(index, int) or index < 0 or (found is not None and len(found) != 16):
        raise _foreign(output, number)
    return index, found


def _foreign(output: OutputFile, number: int) -> UserError:
    return UserError(
        f"{output.name}, line {number} was not written by `shoal generate`, so the job can't be resumed: "
        "give another --output, or --overwrite"
    )


def drop_failed_lines(output: OutputFile, answered: AnsweredPrompts) -> int:
    """Remove lines with an error and second answers. Return the number of bytes to keep.

    Raises:
        UserError: the disk has no room for the copy that this needs; the file is unchanged.
    """
    return output.replace(_answers(output)) if answered.dropped else answered.complete_bytes


def _answers(output: OutputFile) -> Iterator[bytes]:
    seen = AnsweredPrompts()
    for number, line in enumerate(output.lines(), 1):
        if not line.endswith(b"\n"):
            return
        index, found = _read(output, number, line)
        if found is not None and index not in seen:
            seen.add(index, found)
            yield line


class ResumeCheck:
    """Compares prompts, as they are read, with the answers in an output file. `seed` is the job's (see `JobRun`)."""

    def __init__(self, output: OutputFile, answered: AnsweredPrompts, parameters: JobParameters, *, seed: int) -> None:
        self._output = output
        self._answered = answered
        self._parameters = parameters
        self._seed = seed
        self._known = 0

    def answered(self, entry: JobEntry) -> bool:
        """Return whether the file has an answer to this prompt.

        Raises:
            UserError: the file has an answer with this index, to another prompt or with other parameters.
        """
        if entry.index not in self._answered:
            return False
        wanted = self._digest(entry)
        if wanted is None or not self._answered.has(entry.index, wanted):
            raise self._refusal(entry, wanted)
        self._known += 1
        return True

    def finish(self) -> None:
        """Check, after all prompts were read, that every answer belongs to one of them.

        Raises:
            UserError: the file has answers to prompts that do not exist.
        """
        if self._known < self._answered.count:
            more = self._answered.count - self._known
            raise UserError(
                f"{self._output.name} belongs to other prompts: it has {more} more answers than there are prompts, the "
                f"last with index {self._answered.largest_index}; give the prompts that it was made from, or another "
                "--output"
            )

    def _digest(self, entry: JobEntry) -> str | None:
        if entry.error is not None:
            return None
        try:
            return digest(entry, self._parameters.for_entry(entry), self._seed)
        except RequestError:
            return None

    def _refusal(self, entry: JobEntry, wanted: str | None) -> UserError:
        number, line = self._line(entry.index)
        if wanted is not None and same_prompt(str(line["digest"]), wanted):
            what = f"was made with other sampling parameters or another --seed than {entry.where} has now"
        else:
            what = f"answers another prompt than {entry.where}"
        return UserError(
            f"{self._output.name}, line {number} (index {entry.index}) {what}: give the prompts and flags that it was "
            "made from, or another --output, or --overwrite"
        )

    def _line(self, index: int) -> tuple[int, Any]:
        for number, line in enumerate(self._output.lines(), 1):
            if line.endswith(b"\n"):
                found, text = _read(self._output, number, line)
                if found == index and text is not None:
                    return number, {"digest": text}
        return 0, {"digest": ""}


def verify_answers(entries: Iterable[JobEntry], check: ResumeCheck) -> int:
    """Read all prompts and return how many have no answer yet.

    Raises:
        UserError: the answers belong to other prompts or parameters.
    """
    left = sum(1 for entry in entries if not check.answered(entry))
    check.finish()
    return left
