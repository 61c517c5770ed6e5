"""Offline inference: the class `LLM`, whose methods have the same names as in vLLM."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, NoReturn

from tqdm import tqdm

from shoal.activity import AWAKE, Activity
from shoal.config.engine_options import EngineOptions, from_environment
from shoal.errors import ClosedError, ConfigError, EngineError, ReplicasFailed, RequestError
from shoal.launch.early_failure import told_to_other_hosts
from shoal.launch.followed_engine import FollowedEngine
from shoal.launch.open_model import OpenModel, name_of, open_model, trace_target
from shoal.launch.programs import start_program
from shoal.launch.shared_calls import Call
from shoal.llm.beam_search import beam_search
from shoal.llm.comm_profile import print_profile, replicas_of
from shoal.llm.offline import OfflineRunner
from shoal.llm.shared_engine import SharedEngine
from shoal.llm.tracing import Tracing
from shoal.log import get_logger
from shoal.outputs import BeamSearchOutput, RequestOutput
from shoal.params import BeamSearchParams, Message, Prompt, SamplingParams
from shoal.process.interrupts import interrupts
from shoal.protocols import EngineClient
from shoal.text.prompts import Job, RefusedPrompt
from shoal.values import shown
from shoal.wire.engine import EngineStats

log = get_logger("llm")


class LLM:
    """A model with its ranks and the engine that drives them. Close it, or use it in a `with` statement.

    Several threads may use it: their calls take turns, step by step, and each call gets its own outputs. `close` ends
    the calls of other threads with a ClosedError. Only the process that made it may use it: in a forked child every
    call is refused, and neither `close` nor the end of the child has an effect on it. A KeyboardInterrupt is raised
    between two steps, and the engine can be used afterwards.

    If the ranks are spread over hosts, or torchrun has started this process, several processes run the same program.
    One of them has the engine. All make the same calls in the same order, and all get the same results.
    """

    def __init__(self, model: str | PathLike[str] | OpenModel | None = None, **options: Any) -> None:
        """Start the engine, and wait until it is ready.

        Args:
            model: a folder, an id on the Hugging Face hub, None for the bundled model, or an `OpenModel`, which has
                its options with it.
            options: named like the flags of the command line, as in `LLM(model, tensor_parallel_size=2)`. Options that
                are not given may come from environment variables (see docs/flags.md).

        Raises:
            UserError: model, options and host do not fit together; nothing was started.
            EngineError: a rank failed at the start.
        """
        if not isinstance(model, OpenModel):
            given = {**from_environment(), **options}
            with told_to_other_hosts(given):
                model = open_model(name_of(model), given)
        self._model = model
        client, self._calls = start_program(self._model)
        self._activity = AWAKE
        self._shared = SharedEngine(client)
        self._finalizer = weakref.finalize(self, self._shared.close)
        self._calls_finalizer = weakref.finalize(self, self._calls.close)
        self._first_stats = client.stats()
        self._max_model_len = self._first_stats.max_model_len
        self._reader = self._model.reader(self._max_model_len)
        self._grammars = self._model.grammar_checker()
        self._grammars_finalizer = weakref.finalize(self, self._grammars.close)
        self._runner = OfflineRunner(
            self._shared,
            self._model.tokenizer,
            eos=self._model.generation.eos,
            max_model_len=self._max_model_len,
            seed=self.options.model_options.seed,
            replicas=self.options.parallel.data_parallel_size,
        )
        self._tracing = Tracing(
            self._shared,
            trace_target(self.options, self._model.manual_place),
            self.options.tracing.trace_events,
            self._model.name,
        )
        if not isinstance(client, FollowedEngine):  # the process that leads has the engine, and writes the trace
            self._tracing.begin_if_file()

    @property
    def options(self) -> EngineOptions:
        return self._model.options

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """Generate an output for each prompt, and return them in the order of the prompts.

        Args:
            prompts: one prompt or several.
            sampling_params: one object for all prompts, or one for each; None: the defaults of the model (see
                `default_sampling_params`).
            use_tqdm: show a progress bar.

        Raises:
            RequestError: a prompt or a parameter is invalid. The message names it, and nothing was run.
            EngineError: the engine failed. With several replicas it is a ReplicasFailed: no replica is left, and its
                `outputs` are those that had finished.
        """

        def run() -> list[RequestOutput]:
            many = _as_list(prompts)
            params = self._params(sampling_params, len(many))
            jobs = [_prepare_numbered(i, self.prepare, prompt, params[i]) for i, prompt in enumerate(many)]
            self._grammars.check_jobs(jobs)
            return self._run_all(jobs, use_tqdm)

        return self._calls.make(Call("generate", {"prompts": prompts, "sampling_params": sampling_params}), run)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Generate the answer to one conversation or to several, and return them in order.

        Args:
            messages: one conversation, which is a list of messages, or a list of conversations.
            sampling_params: as for `generate`.
            use_tqdm: show a progress bar.
            chat_template: a template instead of the model's own.
            add_generation_prompt: end the prompt with the beginning of the assistant's answer.
            continue_final_message: continue the last message instead of answering it.
            tools: the tools that the model may call, as JSON schemas.
            chat_template_kwargs: more variables for the template.

        Raises:
            RequestError: a message or a parameter is invalid, or the template cannot render the messages.
            EngineError: the engine failed (see `generate`).
        """
        template = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "chat_template_kwargs": chat_template_kwargs,
        }

        def run() -> list[RequestOutput]:
            many = _conversations(messages)
            params = self._params(sampling_params, len(many))
            jobs = [_prepare_numbered(i, self.prepare_chat, each, params[i], **template) for i, each in enumerate(many)]
            self._grammars.check_jobs(jobs)
            return self._run_all(jobs, use_tqdm)

        arguments = {"messages": messages, "sampling_params": sampling_params, **template}
        return self._calls.make(Call("chat", arguments), run)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """Find the likeliest continuations of each prompt, and return them in the order of the prompts, best first.

        Raises:
            RequestError: a prompt is invalid. The message names it, and nothing was run.
            EngineError: the engine failed.
        """
        if not isinstance(params, BeamSearchParams):
            raise RequestError(f"beam_search takes BeamSearchParams, got {shown(params)}", "params")

        def run() -> list[BeamSearchOutput]:
            one_token = SamplingParams(temperature=0, max_tokens=1)
            jobs = [_prepare_numbered(i, self.prepare, prompt, one_token) for i, prompt in enumerate(_as_list(prompts))]
            return beam_search(
                self._next_tokens,
                [job.tokens for job in jobs],
                params,
                eos=self._model.generation.eos,
                max_model_len=self._max_model_len,
                tokenizer=self._model.tokenizer,
            )

        return self._calls.make(Call("beam_search", {"prompts": prompts, "params": params}), run)

    def _next_tokens(self, beams: Sequence[Sequence[int]], count: int) -> list[dict[int, float]]:
        """Return the `count` likeliest next tokens of each beam, with their log-probabilities."""
        params = SamplingParams(temperature=0, max_tokens=1, logprobs=count, detokenize=False, ignore_eos=True)
        jobs = [Job(i, None, tuple(tokens), params) for i, tokens in enumerate(beams)]
        found: list[dict[int, float]] = []
        for output in self._run_all(jobs, use_tqdm=False):
            logprobs = output.outputs[0].logprobs if output.outputs else None
            if not logprobs:
                raise RequestError(f"beam search: {output.error or 'a beam got no token'}")
            found.append({token: each.logprob for token, each in logprobs[0].items()})
        return found

    def embed(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse the call: Shoal does not compute embeddings.

        Raises:
            RequestError: always.
        """
        raise RequestError(
            "embed needs a model that computes embeddings, but Shoal runs models that generate text: use generate or "
            "chat"
        )

    def default_sampling_params(self, base: SamplingParams | None = None) -> SamplingParams:
        """Return `base` with the sampling defaults of the model's generation_config.json.

        With generation_config="vllm" the file is ignored.

        Raises:
            RequestError: `base` is not a SamplingParams.
        """
        if base is not None and not isinstance(base, SamplingParams):
            raise RequestError(f"default_sampling_params takes SamplingParams or None, got {shown(base)}", "base")
        return self._model.default_sampling_params(base)

    def _run_all(self, jobs: Sequence[Job], use_tqdm: bool) -> list[RequestOutput]:
        outputs: dict[int, RequestOutput] = {}
        try:
            with interrupts.held():
                outputs.update(tqdm(self.run(jobs), total=len(jobs), disable=not use_tqdm, unit=" prompts"))
        except ReplicasFailed as error:
            error.outputs = outputs
            raise
        return [outputs[i] for i in range(len(jobs))]

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams) -> Job:
        """Prepare a prompt for `run`. Its output will have this index.

        Raises:
            RequestError: the prompt or a parameter is invalid.
        """
        return self._reader.prepare(index, prompt, params)

    def prepare_chat(self, index: int, messages: Sequence[Message], params: SamplingParams, **template: Any) -> Job:
        """Prepare a conversation for `run`. Its output will have this index.

        Args:
            template: arguments for `ChatTemplate.render`.

        Raises:
            RequestError: a message or a parameter is invalid, or the template cannot render the messages.
        """
        return self._reader.prepare_chat(index, messages, params, **template)

    def run(self, jobs: Iterable[Job | RefusedPrompt], *, ordered: bool = False) -> Iterator[tuple[int, RequestOutput]]:
        """Run jobs, and yield the index and the output of each.

        Jobs are taken when there is room for them. Between two outputs nothing is locked, so that this thread and
        others can make other calls.

        Args:
            ordered: yield the outputs in the order of the jobs, and not as they finish.

        Raises:
            RequestError: the engine is asleep.
        """
        if not self._activity.runs:
            raise RequestError("the engine is asleep: call wake_up() first")
        # As this is a generator too, it holds a reference to this LLM, which is not finalized while the run goes on.
        yield from self._runner.run(jobs, ordered=ordered)

    # --- memory ----------------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Give the memory of weights and KV cache back to the system, on every rank.

        Args:
            level: 1 and 2 are the same: the weights are read from their files again when the engine wakes up. 0 only
                pauses.
            mode: has no effect, because no requests may be running.

        Raises:
            RequestError: there are unfinished requests.
            ConfigError: there is no such level, or the ranks share experts with ranks of other processes.
            EngineError: the engine failed.
        """
        activity = self._activity.sleep(level)
        if level and self._model.manual_place is not None and self._model.plan.layout.shares_experts:
            raise ConfigError(
                "this replica shares experts with replicas of other processes, which could not compute while it sleeps"
            )
        self._calls.make(Call("sleep", {"level": level}), lambda: self._become(activity))
        self._activity = activity

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Take the memory again: all of it, or the parts in `tags` ("weights", "kv_cache").

        Raises:
            CheckpointError: the files of the weights have changed; the engine is still asleep.
            ConfigError: there is no such part.
            EngineError: the engine failed.
        """
        activity = self._activity.wake_up(tags)
        self._calls.make(Call("wake_up", {"tags": tags}), lambda: self._become(activity))
        self._activity = activity

    def is_sleeping(self) -> bool:
        """Return True if the engine is asleep or paused."""
        return not self._activity.runs

    def _become(self, activity: Activity) -> None:
        with self._shared.turn() as client:
            if self._activity.runs and not activity.runs:
                stats = client.stats()
                if unfinished := stats.running + stats.waiting:
                    raise RequestError(f"{unfinished} requests are not finished: iterate over all their outputs first")
            client.set_activity(activity)
            self._activity = activity

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Empty the prefix cache of every replica. Return True.

        Args:
            reset_running_requests: have running requests compute their blocks again, too.
            reset_connector: has no effect, as there is no connector to another cache.

        Raises:
            EngineError: the engine failed.
        """

        def run() -> None:
            with self._shared.turn() as client:
                client.reset_prefix_cache(running=reset_running_requests)

        self._calls.make(Call("reset_prefix_cache", {"reset_running_requests": reset_running_requests}), run)
        return True

    # --- traces ----------------------------------------------------------------------------------------------------

    def start_profile(self) -> None:
        """Begin a trace. The option `trace` says where its file will be.

        Raises:
            ConfigError: a trace is recorded already, or its file cannot be written.
            EngineError: the engine failed.
        """
        self._calls.make(Call("start_profile", {}), self._tracing.start)

    def stop_profile(self) -> None:
        """End the trace. The log says where its file is.

        Raises:
            ConfigError: no trace is recorded.
        """
        self._calls.make(Call("stop_profile", {}), self._tracing.stop)

    @property
    def engine(self) -> EngineClient:
        """The engine itself, for programs that work with tokens and single steps.

        It is for one thread, while no other call of this LLM is running.
        """
        self._shared.check()
        return self._shared.client

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def stats(self) -> EngineStats:
        return self._shared.stats()

    def close(self) -> None:
        """End the engine and its ranks. Calls of other threads end with a ClosedError. Idempotent.

        With `profile_comm` a table of what communication between the ranks has cost is printed to stderr before.
        """
        if self.options.parallel.profile_comm and self._finalizer.alive:
            self._print_comm_profile()
        self._finalizer()
        self._calls_finalizer()
        self._grammars_finalizer()

    def _print_comm_profile(self) -> None:
        try:
            stats = self.stats()
        except ClosedError:  # a forked child, or another thread has closed it
            return
        except EngineError as error:
            log.warning("--profile-comm has no figures, since the engine has failed: %s", error)
            return
        if stats.steps > self._first_stats.steps:  # a follower has no figures of its own
            print_profile(replicas_of(stats), replicas_of(self._first_stats))

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or self.default_sampling_params()] * count
        if isinstance(given, str | bytes) or not isinstance(given, Sequence):
            raise RequestError.about("sampling_params", f"must be SamplingParams or a list of them, got {shown(given)}")
        for each in given:
            if not isinstance(each, SamplingParams):
                raise RequestError.about(
                    "sampling_params", f"must be SamplingParams or a list of them, got {shown(each)} in it"
                )
        if len(given) != count:
            raise RequestError(
                f"there are {count} prompts, but {len(given)} sampling_params: give one for all prompts, or one for "
                "each",
                "sampling_params",
            )
        return given


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, dict):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise RequestError.about("prompts", f"must be a prompt or a list of them, got {shown(prompts)}")
    return list(prompts)


def _conversations(messages: Any) -> list[Sequence[Message]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RequestError.about(
            "messages", f"must be a list of messages, or a list of such lists, got {shown(messages)}"
        )
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)


def _prepare_numbered(index: int, prepare: Callable[..., Job], *arguments: Any, **template: Any) -> Job:
    """Prepare one of several prompts, so that an error names its number.

    Raises:
        RequestError: the prompt or a parameter is invalid.
    """
    try:
        return prepare(index, *arguments, **template)
    except RequestError as error:
        raise error.within(f"prompt {index}") from None
