"""`--resume`: which prompts an output file has answered, and whether they are these prompts.

A line is an answer if it is whole (a line break ends it), has an `index` and a `digest`, and no `error`. Lines with an
error are taken out, so that their prompts run again; so is what follows the last line break, if it begins like a line
of ours.
"""

import json
from array import array
from collections.abc import Iterable, Iterator
from typing import Any

from shoal.errors import RequestError, UserError
from shoal.jobs.entries import JobEntry, digest, same_prompt
from shoal.jobs.parameters import Parameters
from shoal.jobs.writing import OutputFile

_PAGE = 4096
_BEGINNINGS = (b'{"index": ', b'{"id": "batch_req-')  # of a line: ours, and that of a batch


class Answered:
    """What a file holds: eight bytes for each index, whatever its lines hold."""

    def __init__(self) -> None:
        self._pages: dict[int, array[int]] = {}
        self.count = 0
        self.last = -1  # the largest index
        self.bytes = 0  # of whole lines
        self.dropped = 0  # lines with an error, and second answers

    def add(self, index: int, found: str) -> None:
        page = self._pages.setdefault(index // _PAGE, array("Q", bytes(8 * _PAGE)))
        if page[index % _PAGE]:
            self.dropped += 1
            return
        page[index % _PAGE] = _number(found)
        self.count += 1
        self.last = max(self.last, index)

    @property
    def held_bytes(self) -> int:
        """Bytes that the indices take in memory."""
        return sum(len(page) * page.itemsize for page in self._pages.values())

    def __contains__(self, index: int) -> bool:
        page = self._pages.get(index // _PAGE)
        return page is not None and page[index % _PAGE] != 0

    def has(self, index: int, wanted: str) -> bool:
        page = self._pages.get(index // _PAGE)
        return page is not None and page[index % _PAGE] == _number(wanted)


def _number(text: str) -> int:
    return int(text, 16) or 1  # 0 stands for none


def scan(output: OutputFile) -> Answered:
    """
    Raises:
        UserError: a line is none that `shoal generate` writes; of a cut last one, its beginning.
    """
    answered = Answered()
    for number, line in enumerate(output.lines(), 1):
        if not line.endswith(b"\n"):
            if not any(line.startswith(own) or own.startswith(line) for own in _BEGINNINGS):
                raise _foreign(output, number)
            break
        answered.bytes += len(line)
        index, found = _read(output, number, line)
        if found is None:
            answered.dropped += 1
        else:
            answered.add(index, found)
    return answered


def _read(output: OutputFile, number: int, line: bytes) -> tuple[int, str | None]:
    """Index and digest; no digest where the line has an error."""
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
        f"{output.name}, line {number} was not written by `shoal generate`, which numbers its lines: "
        "it can't be resumed; give another --output, or --overwrite"
    )


def compact(output: OutputFile, answered: Answered) -> int:
    """Takes out what is no answer. Gives the bytes to keep.

    Raises:
        UserError: there is no room for the copy that this takes; the file is as it was.
    """
    return output.replace(_answers(output)) if answered.dropped else answered.bytes


def _answers(output: OutputFile) -> Iterator[bytes]:
    seen = Answered()
    for number, line in enumerate(output.lines(), 1):
        if not line.endswith(b"\n"):
            return
        index, found = _read(output, number, line)
        if found is not None and index not in seen:
            seen.add(index, found)
            yield line


class Check:
    """Holds prompts, as they are read, against the answers that are there. `seed` is the job's, as for a `JobRun`."""

    def __init__(self, output: OutputFile, answered: Answered, parameters: Parameters, *, seed: int) -> None:
        self._output = output
        self._answered = answered
        self._parameters = parameters
        self._seed = seed
        self._known = 0

    def answered(self, entry: JobEntry) -> bool:
        """
        Raises:
            UserError: there is an answer, to another prompt or to one with other parameters.
        """
        if entry.index not in self._answered:
            return False
        wanted = self._digest(entry)
        if wanted is None or not self._answered.has(entry.index, wanted):
            raise self._refusal(entry, wanted)
        self._known += 1
        return True

    def finish(self) -> None:
        """All prompts were read.

        Raises:
            UserError: there are answers to prompts that do not exist.
        """
        if self._known < self._answered.count:
            more = self._answered.count - self._known
            raise UserError(
                f"{self._output.name} belongs to other prompts: it answers {more} more than there are, the last "
                f"with index {self._answered.last}; give the prompts it was made from, or another --output"
            )

    def _digest(self, entry: JobEntry) -> str | None:
        if entry.error is not None:
            return None
        try:
            return digest(entry, self._parameters.of(entry), self._seed)
        except RequestError:
            return None

    def _refusal(self, entry: JobEntry, wanted: str | None) -> UserError:
        number, line = self._line(entry.index)
        if wanted is not None and same_prompt(str(line["digest"]), wanted):
            what = f"was made with other sampling parameters, or another --seed, than {entry.where} asks for now"
        else:
            what = f"answers another prompt than {entry.where}"
        return UserError(
            f"{self._output.name}, line {number} (index {entry.index}) {what}: give the prompts and flags it was made "
            "from, or another --output, or --overwrite"
        )

    def _line(self, index: int) -> tuple[int, Any]:
        for number, line in enumerate(self._output.lines(), 1):
            if line.endswith(b"\n"):
                found, text = _read(self._output, number, line)
                if found == index and text is not None:
                    return number, {"digest": text}
        return 0, {"digest": ""}


def verify(entries: Iterable[JobEntry], check: Check) -> int:
    """Reads all prompts, and gives how many have no answer yet.

    Raises:
        UserError: as `Check`.
    """
    left = sum(1 for entry in entries if not check.answered(entry))
    check.finish()
    return left
