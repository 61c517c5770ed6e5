"""`shoal generate`: prompts in, text out."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from shoal.cli.options import GroupedCommand, engine_flags, engine_values
from shoal.errors import RequestError, UserError
from shoal.frontend.llm import LLM
from shoal.frontend.model import open_model
from shoal.frontend.prompts import Job, PromptReader
from shoal.types import Prompt, RequestOutput, SamplingParams

_BUNDLED_PROMPTS = ("37 + 45 =", "Count from 3 to 9:", "Reverse: apple ->", "Sort: pear apple fig ->", "8 + 64 =")


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@click.option("-p", "--prompt", "prompts", multiple=True, help="a prompt; may be given several times")
@click.option("--prompts-file", type=click.Path(path_type=Path), help="JSON lines with prompt or prompt_token_ids")
@click.option("--output", type=click.Path(path_type=Path, dir_okay=False), help="write JSON lines to this file")
@click.option("--max-tokens", type=int, default=64, show_default=True, help="tokens to generate at most")
@click.option("--temperature", type=float, default=0.0, show_default=True, help="0 is greedy")
@click.option("--top-p", type=float, default=1.0, show_default=True, help="draw from the likeliest tokens of this mass")
@click.option("--top-k", type=int, default=0, show_default=True, help="draw from so many likeliest tokens; 0: all")
@click.option("--sample-seed", type=int, help="seed of the draws; the same seed gives the same text")
@click.option("--ignore-eos", is_flag=True, help="go on after the end-of-text token")
@engine_flags
def generate(
    model: str | None,
    prompts: tuple[str, ...],
    prompts_file: Path | None,
    output: Path | None,
    max_tokens: int,
    temperature: float,
    top_p: float,
    top_k: int,
    sample_seed: int | None,
    ignore_eos: bool,
    **flags: Any,
) -> int:
    """Generate text. MODEL is a folder or an id on the Hugging Face hub; without it, the bundled model is used."""
    params = SamplingParams(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        max_tokens=max_tokens,
        seed=sample_seed,
        ignore_eos=ignore_eos,
    )
    entries = _entries(model, prompts, prompts_file)
    opened = open_model(model, engine_values(flags), own_process=True)
    _check_typed(opened.reader(), entries, params)
    with ExitStack() as stack:
        sink = stack.enter_context(_Sink(output)) if output else None
        llm = stack.enter_context(LLM(opened))
        return _run(llm, entries, params, sink)


@dataclass(frozen=True, slots=True)
class _Entry:
    index: int
    prompt: Prompt
    typed: bool = False  # by -p: whoever typed it is there to mend it

    @property
    def text(self) -> str | None:
        return self.prompt if isinstance(self.prompt, str) else None

    @property
    def tokens(self) -> Sequence[int]:
        return (
            self.prompt["prompt_token_ids"]
            if isinstance(self.prompt, dict) and "prompt_token_ids" in self.prompt
            else ()
        )


def _entries(model: str | None, prompts: Sequence[str], file: Path | None) -> list[_Entry]:
    given: list[Prompt] = list(prompts)
    if file is not None:
        given += _read_prompts(file)
    if not given:
        if model is not None:
            raise UserError("no prompts: give -p TEXT or --prompts-file FILE")
        given += _BUNDLED_PROMPTS
    return [_Entry(index, prompt, typed=index < len(prompts)) for index, prompt in enumerate(given)]


def _check_typed(reader: PromptReader | LLM, entries: Sequence[_Entry], params: SamplingParams) -> None:
    """Refuses a prompt of -p that can't be used, before anything is started for it.

    Raises:
        RequestError: it is named.
    """
    for entry in entries:
        if entry.typed:
            try:
                reader.prepare(entry.index, entry.prompt, params)
            except RequestError as error:
                raise RequestError(f"prompt {entry.index}: {error}") from None


def _read_prompts(file: Path) -> list[Prompt]:
    try:
        lines = file.read_text("utf-8").split("\n")  # JSON texts may hold other line separators as they are
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--prompts-file {file} can't be read: {error}") from None
    return [_read_line(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _read_line(file: Path, number: int, line: str) -> Prompt:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, line {number} is no JSON: {error}") from None
    if isinstance(entry, dict) and isinstance(entry.get("prompt"), str):
        return str(entry["prompt"])
    if isinstance(entry, dict) and isinstance(entry.get("prompt_token_ids"), list):
        return {"prompt_token_ids": entry["prompt_token_ids"]}
    raise UserError(f"{file}, line {number} has neither a text `prompt` nor a list `prompt_token_ids`")


class _Sink:
    """The file of --output: a JSON object a line."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with self._named():
            # The one thing that UTF-8 can't hold is half of a surrogate pair; JSON has an escape for it, the same.
            self._file = path.open("w", encoding="utf-8", errors="backslashreplace")

    def write(self, line: Mapping[str, Any]) -> None:
        with self._named():
            print(json.dumps(line, ensure_ascii=False), file=self._file, flush=True)

    def __enter__(self) -> "_Sink":
        return self

    def __exit__(self, *_: object) -> None:
        with self._named():
            self._file.close()

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(f"--output {self._path} can't be written: {error.strerror}") from None


def _run(llm: LLM, entries: Sequence[_Entry], params: SamplingParams, sink: _Sink | None) -> int:
    """Writes results as they come; a prompt that can't be used fails alone. Gives the exit code."""
    _check_typed(llm, entries, params)  # once more: the ranks may have found less room than was planned
    failures: list[tuple[_Entry, str]] = []
    printer = _Printer()

    def jobs() -> Iterator[Job]:
        for entry in entries:
            try:
                yield llm.prepare(entry.index, entry.prompt, params)
            except RequestError as error:
                failures.append((entry, str(error)))
                printer.add(entry.index, None)

    progress = tqdm(total=len(entries), unit=" prompts", disable=sink is None or not sys.stderr.isatty())
    with progress:
        for index, output in llm.run(jobs()):
            progress.update()
            if sink is not None:
                sink.write(_line(index, output))
            else:
                printer.add(index, output)
            if output.error:
                failures.append((entries[index], output.error))
    for entry, why in failures:
        if sink is not None:
            line = {"index": entry.index, "prompt": entry.text, "prompt_token_ids": list(entry.tokens), "outputs": []}
            sink.write({**line, "error": why})
        print(f"error: prompt {entry.index}: {why}", file=sys.stderr)
    return 1 if failures else 0


def _line(index: int, output: RequestOutput) -> dict[str, Any]:
    return {
        "index": index,
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "outputs": [
            {"text": each.text, "token_ids": list(each.token_ids), "finish_reason": each.finish_reason}
            for each in output.outputs
        ],
    }


class _Printer:
    """Prints results in the prompts' order, each as soon as those before it are there."""

    def __init__(self) -> None:
        self._next = 0
        self._early: dict[int, RequestOutput | None] = {}

    def add(self, index: int, output: RequestOutput | None) -> None:
        """None: the prompt has no result."""
        self._early[index] = output
        while self._next in self._early:
            ready = self._early.pop(self._next)
            self._next += 1
            if ready is not None:
                self._print(ready)

    def _print(self, output: RequestOutput) -> None:
        completion = output.outputs[0]
        prompt = output.prompt if output.prompt is not None else f"{len(output.prompt_token_ids)} tokens"
        text = completion.text if output.prompt is not None else f" {' '.join(map(str, completion.token_ids))}"
        print(f"{prompt}{text}", flush=True)
