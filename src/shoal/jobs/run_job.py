"""Running a job: a bounded window of prompts is prepared and run at a time, so that any number takes little memory."""

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

from shoal.errors import RequestError
from shoal.jobs.entries import JobEntry, digest, uses_job_seed
from shoal.jobs.parameters import JobParameters
from shoal.outputs import RequestOutput
from shoal.params import Message, Prompt, SamplingParams
from shoal.text.prompts import Job, RefusedPrompt, salted


class Preparer(Protocol):
    """Something that checks prompts and cuts them into tokens: a `PromptReader` or an `LLM`."""

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams) -> Job: ...

    def prepare_chat(self, index: int, messages: Sequence[Message], params: SamplingParams, **template: Any) -> Job: ...


class JobRunner(Preparer, Protocol):
    """Something that runs jobs in a bounded window: an `LLM`."""

    def run(
        self, jobs: Iterable[Job | RefusedPrompt], *, ordered: bool = False
    ) -> Iterator[tuple[int, RequestOutput]]: ...


def prepare(preparer: Preparer, entry: JobEntry, params: SamplingParams) -> Job:
    """Return the job of an entry.

    Raises:
        RequestError: the entry can't be used.
    """
    if entry.error is not None:
        raise RequestError(entry.error)
    if entry.messages is not None:
        return preparer.prepare_chat(entry.index, entry.messages, params, cache_salt=entry.cache_salt)
    if entry.prompt is None:
        raise RequestError("it has no prompt")
    return preparer.prepare(entry.index, salted(entry.prompt, entry.cache_salt), params)


class JobRun:
    """A run of the prompts of a job on an engine."""

    def __init__(self, engine: JobRunner, parameters: JobParameters, *, seed: int) -> None:
        """Prepare a run.

        `seed`: prompts without a seed get one from this seed and their index, so that a resumed job draws the same
        tokens.
        """
        self._engine = engine
        self._parameters = parameters
        self._seed = seed
        self._pending: dict[int, tuple[JobEntry, str]] = {}  # entries that the engine runs, with their digests

    @property
    def unfinished(self) -> int:
        """The number of entries that the engine has and has not finished; never more than its window."""
        return len(self._pending)

    def __call__(
        self,
        entries: Iterable[JobEntry],
        *,
        ordered: bool = False,
        skip: Callable[[JobEntry], bool] = lambda _: False,
        finish: Callable[[], None] = lambda: None,
    ) -> Iterator[tuple[JobEntry, str, RequestOutput]]:
        """Run entries, and yield each with its digest and output. An entry that can't be used gets an output with an
        error.

        Args:
            ordered: yield in the order of the entries, not as they finish.
            skip: returns whether to leave an entry out.
            finish: called when all entries were read.
        """
        for index, output in self._engine.run(self._jobs(entries, skip, finish), ordered=ordered):
            entry, found = self._pending.pop(index)
            yield entry, found, output

    def _jobs(
        self, entries: Iterable[JobEntry], skip: Callable[[JobEntry], bool], finish: Callable[[], None]
    ) -> Iterator[Job | RefusedPrompt]:
        for entry in entries:
            if not skip(entry):
                job, found = self._job(entry)
                self._pending[entry.index] = (entry, found)
                yield job
        finish()

    def _job(self, entry: JobEntry) -> tuple[Job | RefusedPrompt, str]:
        try:
            params = self._parameters.for_entry(entry)
            return prepare(self._engine, entry, self._seeded(entry.index, params)), digest(entry, params, self._seed)
        except RequestError as error:
            return RefusedPrompt(entry.index, entry.text, (), str(error)), ""

    def _seeded(self, index: int, params: SamplingParams) -> SamplingParams:
        if not uses_job_seed(params):
            return params
        drawn = hashlib.blake2b(f"{self._seed}:{index}".encode(), digest_size=8).digest()
        return dataclasses.replace(params, seed=int.from_bytes(drawn, "little"))
