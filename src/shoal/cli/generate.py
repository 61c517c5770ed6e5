"""`shoal generate`: prints the outputs of prompts, or writes those of a whole file."""

import itertools
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from typing import Any

import click
from click.core import ParameterSource

from shoal.cli.interrupts import Interrupted, SignalHolder
from shoal.cli.options import GroupedCommand, engine_flags, engine_values
from shoal.cli.progress import JobProgress
from shoal.cli.sampling import DEFAULTS, sampling_flags, sampling_values
from shoal.errors import ConfigError, EngineError, RequestError, UserError
from shoal.jobs.entries import JobEntry
from shoal.jobs.output_file import OutputFailed, OutputFile
from shoal.jobs.output_lines import output_line
from shoal.jobs.parameters import JobParameters
from shoal.jobs.prompt_file import PromptFile, as_chat
from shoal.jobs.resume import AnsweredPrompts, ResumeCheck, drop_failed_lines, scan_answers, verify_answers
from shoal.jobs.run_job import JobRun, Preparer, prepare
from shoal.launch import hub
from shoal.launch.early_failure import told_to_other_hosts
from shoal.launch.open_model import OpenModel, open_model
from shoal.llm.llm import LLM
from shoal.log import get_logger
from shoal.outputs import CompletionOutput, RequestOutput
from shoal.params import SamplingParams
from shoal.text.prompts import Job

log = get_logger("generate")

# What both bundled models were trained on: the dense one and the mixture of experts.
_BUNDLED_PROMPTS = ("37 + 45 =", "Count from 3 to 9:", "Reverse: apple ->", "Sort: pear apple fig ->", "8 + 64 =")
_TOLD_FAILURES = 20  # failed prompts that are named on stderr; with --output the file has them all


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@click.option("-p", "--prompt", "prompts", multiple=True, metavar="TEXT", help="a prompt; may be given several times")
@click.option(
    "--prompts-file",
    metavar="FILE",
    help="file of prompts: one per line (.txt), JSON lines (.jsonl) or a column (.csv); -: stdin",
)
@click.option(
    "--prompt-column",
    default="prompt",
    show_default=True,
    metavar="NAME",
    help="column of a .csv file that has the prompts",
)
@click.option("--chat", is_flag=True, help="take each prompt as a user's message, and apply the model's chat template")
@click.option("--output", metavar="FILE", help="file for JSON lines, written as requests finish; -: stdout")
@click.option("--ordered", is_flag=True, help="write lines in the order of the prompts")
@click.option("--resume", is_flag=True, help="go on with --output: skip prompts that it has answers to")
@click.option("--overwrite", is_flag=True, help="begin --output anew, even if it is not empty")
@sampling_flags
@engine_flags
def generate(
    model: str | None,
    prompts: tuple[str, ...],
    prompts_file: str | None,
    prompt_column: str,
    output: str | None,
    *,
    chat: bool,
    ordered: bool,
    resume: bool,
    overwrite: bool,
    **flags: Any,
) -> int:
    """Generate text. MODEL is a folder or an id on the Hugging Face hub; without it, the bundled model is used.

    A JSON line has `prompt`, `prompt_token_ids` or `messages`, and perhaps `sampling_params`. It may also be a request
    in OpenAI's batch format; then the answer has that format, too.
    """
    sampling = sampling_values(flags)
    if _typed("resume"):  # the command line overrides the file of --config
        overwrite = overwrite and _typed("overwrite")
    elif _typed("overwrite"):
        resume = False
    values = engine_values(flags)
    with told_to_other_hosts(values):
        _check_output(output, prompts_file, resume=resume, overwrite=overwrite)
        given = _Prompts.of(model, prompts, prompts_file, column=prompt_column, chat=chat)
    if values.get("node_rank"):
        from shoal.launch import node

        return node.run(model, values, online=False)
    with told_to_other_hosts(values):
        opened = open_model(model, values, own_process=True)
        parameters = JobParameters(DEFAULTS, sampling, opened.default_sampling_params)
        if chat:
            opened.reader().prepare_chat(0, [{"role": "user", "content": "a"}], DEFAULTS)  # raises without a template
        typed = given.check_typed(opened.reader(), parameters)
        with closing(opened.grammar_checker()) as grammars:
            grammars.check_jobs(typed)
    if output is None:
        with LLM(opened) as llm:
            return _print(llm, given, parameters)
    with OutputFile(output) as file:
        if not (resume or overwrite or file.empty):  # another run may have written to it meanwhile
            raise _not_empty(output)
        return _FileJob(opened, given, parameters, file, ordered=ordered, resume=resume).run()


def _typed(name: str) -> bool:
    """Return whether a flag is on the command line."""
    return click.get_current_context().get_parameter_source(name) is ParameterSource.COMMANDLINE


def _check_output(output: str | None, prompts: str | None, *, resume: bool, overwrite: bool) -> None:
    """Check the flags for the output against each other and the file.

    Raises:
        ConfigError: flags or files do not go together.
        UserError: the file is not empty, and neither --resume nor --overwrite is given.
    """
    for name, value in (("--resume", resume), ("--overwrite", overwrite)):
        if value and output is None:
            raise ConfigError(f"{name} needs --output FILE")
    if resume and overwrite:
        raise ConfigError("give --resume or --overwrite, not both")
    if output is None or output == "-":
        return
    if prompts is not None and os.path.realpath(output) == os.path.realpath(prompts):
        raise ConfigError(f"--output and --prompts-file are the same file, {output}")
    if not (resume or overwrite) and os.path.isfile(output) and os.path.getsize(output):
        raise _not_empty(output)


def _not_empty(output: str) -> UserError:
    return UserError(f"--output {output} is not empty: add --resume to go on with it, or --overwrite to begin anew")


@dataclass(frozen=True, slots=True)
class _Prompts:
    """All prompts of a command: first those of -p, then those of the file."""

    typed: Sequence[JobEntry]
    file: PromptFile | None

    @classmethod
    def of(cls, model: str | None, typed: Sequence[str], path: str | None, *, column: str, chat: bool) -> "_Prompts":
        """Collect the prompts that a command was given; without any, a bundled model has its own.

        Raises:
            UserError: there are no prompts, or the file can't be used.
        """
        file = PromptFile(path, column=column, chat=chat, first_index=len(typed)) if path is not None else None
        if not typed and (file is None or file.empty):
            if not hub.is_bundled(model) or file is not None:
                raise UserError("no prompts: give -p TEXT or --prompts-file FILE, a file with one prompt per line")
            typed = _BUNDLED_PROMPTS
        entries = [JobEntry(index, "-p", prompt=text) for index, text in enumerate(typed)]
        return cls([as_chat(entry) for entry in entries] if chat else entries, file)

    def __iter__(self) -> Iterator[JobEntry]:
        return itertools.chain(self.typed, self.file or ())

    @property
    def rereadable(self) -> bool:
        return self.file is None or self.file.rereadable

    def count(self) -> int | None:
        inside = self.file.count() if self.file is not None else 0
        return None if inside is None else len(self.typed) + inside

    def check_typed(self, preparer: Preparer, parameters: JobParameters) -> list[Job]:
        """Prepare the prompts of -p. A wrong one ends the command, since the user who typed it can correct it.

        Raises:
            RequestError: a prompt can't be used; the message says which.
        """
        jobs = []
        for entry in self.typed:
            try:
                jobs.append(prepare(preparer, entry, parameters.for_entry(entry)))
            except RequestError as error:
                raise error.within(f"prompt {entry.index}") from None
        return jobs


def _print(llm: LLM, given: _Prompts, parameters: JobParameters) -> int:
    """Print the outputs in the order of the prompts, and return the exit code."""
    given.check_typed(llm, parameters)  # again, since the ranks may have found less memory than was planned
    failed = 0
    for entry, _, output in JobRun(llm, parameters, seed=llm.options.model_options.seed)(given, ordered=True):
        if output.error is not None:
            failed += 1
            print(_failure(entry, output.error), file=sys.stderr)
            continue
        for each in output.outputs:
            print(_shown(entry, output, each), flush=True)
        if remark := _incomplete(entry, output, parameters.for_entry(entry)):
            print(remark, file=sys.stderr)
    _log_drafts(llm)
    return 1 if failed else 0


def _log_drafts(llm: LLM) -> None:
    """Log the success of speculative decoding, if it is on."""
    if llm.options.model_options.speculative_config is None:
        return
    stats = llm.stats()
    share = stats.accepted_tokens / stats.draft_tokens if stats.draft_tokens else 0.0
    log.info(
        "speculative decoding: %d of %d drafts were right (%.0f %%), %d tokens in %d steps",
        *(stats.accepted_tokens, stats.draft_tokens, 100 * share, stats.generated_tokens, stats.steps),
    )


def _shown(entry: JobEntry, output: RequestOutput, each: CompletionOutput) -> str:
    """Return what to print: the prompt and its output; only the answer in a chat; tokens if the prompt has no text."""
    if entry.messages is not None:
        return each.text
    if output.prompt is not None:
        return output.prompt + each.text
    return f"{len(output.prompt_token_ids)} tokens {' '.join(map(str, each.token_ids))}"


def _incomplete(entry: JobEntry, output: RequestOutput, params: SamplingParams) -> str | None:
    """Return a warning if a structured output was cut at a limit of length: it may be half a JSON object."""
    cut = [len(each.token_ids) for each in output.outputs if each.finish_reason == "length"]
    if params.structured_outputs is None or not cut:
        return None
    flag = "--max-model-len" if params.max_tokens is None or min(cut) < params.max_tokens else "--max-tokens"
    own = " or the prompt's own max_tokens" if flag == "--max-tokens" and entry.where != "-p" else ""
    return f"warning: {_named(entry)}: the output was cut at {min(cut)} tokens and may be incomplete; raise {flag}{own}"


def _failure(entry: JobEntry, why: str) -> str:
    return f"error: {_named(entry)}: {why}"


def _named(entry: JobEntry) -> str:
    where = "" if entry.where == "-p" else f" ({entry.where})"
    return f"prompt {entry.index}{where}"


class _FileJob:
    """A run whose answers go into a file. However it ends, finished answers are in the file, and the last message says
    how to go on."""

    def __init__(
        self,
        opened: OpenModel,
        given: _Prompts,
        parameters: JobParameters,
        output: OutputFile,
        *,
        ordered: bool,
        resume: bool,
    ) -> None:
        self._opened = opened
        self._given = given
        self._parameters = parameters
        self._output = output
        self._ordered = ordered
        self._resume = resume
        self._seed = opened.options.model_options.seed
        self._begun = False  # until then the file is unchanged
        self._written = 0
        self._failed = 0
        self._total = given.count()

    def run(self) -> int:
        """Run the job and return the exit code.

        Raises:
            UserError: the file belongs to other prompts; nothing was started, and the file is unchanged.
            Interrupted, OutputFailed, EngineError: the message says how to go on.
        """
        answered = self._answered()
        check = self._check(answered)
        if answered.count and self._given.rereadable and verify_answers(self._given, check) == 0:
            print(f"{self._output.name} answers all {answered.count} prompts: nothing is left to do", file=sys.stderr)
            self._output.start(keep=drop_failed_lines(self._output, answered))
            return 0
        keep = drop_failed_lines(self._output, answered)
        self._written = answered.count
        try:
            self._generate(self._check(answered), keep)
        except KeyboardInterrupt:
            raise Interrupted(self._how_to_go_on()) from None
        except OutputFailed as error:
            raise OutputFailed(f"{error}; {self._how_to_go_on()}") from None
        except EngineError as error:
            if not self._written:
                raise
            raise EngineError(f"{error}; {self._how_to_go_on()}") from error
        return 1 if self._failed else 0

    def _answered(self) -> AnsweredPrompts:
        if self._resume and not self._output.regular:
            raise UserError(f"--resume needs an --output that can be read; {self._output.name} is not a regular file")
        return scan_answers(self._output) if self._resume else AnsweredPrompts()

    def _check(self, answered: AnsweredPrompts) -> ResumeCheck:
        return ResumeCheck(self._output, answered, self._parameters, seed=self._seed)

    def _generate(self, check: ResumeCheck, keep: int) -> None:
        with ExitStack() as stack:
            llm = stack.enter_context(LLM(self._opened))
            interrupts = stack.enter_context(SignalHolder())
            self._given.check_typed(llm, self._parameters)
            with interrupts.held():
                self._output.start(keep)
                self._begun = True
            progress = JobProgress(self._total, done=self._written)
            stack.callback(progress.close)
            run = JobRun(llm, self._parameters, seed=self._seed)
            results = run(self._given, ordered=self._ordered, skip=check.answered, finish=check.finish)
            for entry, digest, output in results:
                with interrupts.held():  # a line and its count belong together
                    self._write(entry, digest, output, progress)
            _log_drafts(llm)
            if self._failed > _TOLD_FAILURES:
                progress.tell(f"error: {self._failed} prompts have failed; their lines have an `error`")

    def _write(self, entry: JobEntry, digest: str, output: RequestOutput, progress: JobProgress) -> None:
        self._output.write(output_line(entry, digest, output, self._opened.name))
        progress.add(output)
        if output.error is None:
            self._written += 1
            return
        self._failed += 1
        if self._failed <= _TOLD_FAILURES:
            progress.tell(_failure(entry, output.error))

    def _how_to_go_on(self) -> str:
        stdin = not self._given.rereadable
        if not self._begun and not self._resume:
            return f"nothing was changed; start again with: {command_line(sys.argv[1:], stdin=stdin)}"
        of = f" of {self._total}" if self._total is not None else ""
        held = f"{self._output.name} holds {self._written}{of} answers"
        if not self._output.regular:
            return held
        return f"{held}; go on with: {resume_command(sys.argv[1:], stdin=stdin)}"


def resume_command(arguments: Sequence[str], *, stdin: bool) -> str:
    """Return the command that goes on with the job of this one."""
    same = [argument for argument in arguments if argument not in ("--overwrite", "--resume")]
    return command_line([*same, "--resume"], stdin=stdin)


def command_line(arguments: Sequence[str], *, stdin: bool) -> str:
    return shlex.join(["shoal", *arguments]) + (" (with the same prompts on stdin)" if stdin else "")
