"""`LLM`: offline inference, with vLLM's names."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from os import PathLike
from types import TracebackType
from typing import Any, NoReturn

from tqdm import tqdm

from shoal.activity import AWAKE, Activity
from shoal.config.engine_options import EngineOptions, from_environment
from shoal.errors import ConfigError, ReplicasFailed, RequestError
from shoal.launch.offline_engines import start_engine
from shoal.launch.open_model import OpenModel, name_of, open_model
from shoal.llm.beam_search import beam_search
from shoal.llm.offline import OfflineRunner
from shoal.llm.shared_engine import SharedEngine
from shoal.outputs import BeamSearchOutput, RequestOutput
from shoal.params import BeamSearchParams, Message, Prompt, SamplingParams
from shoal.process.interrupts import interrupts
from shoal.protocols import EngineClient
from shoal.text.prompts import Job, RefusedPrompt
from shoal.values import shown
from shoal.wire.engine import EngineStats


class LLM:
    """A model, its ranks, and an engine that keeps them busy. Close it, or use it in a `with`.

    Several threads may use it: their calls take turns, step by step, and each gets its own outputs. `close` ends the
    calls of others with a ClosedError. It belongs to the process that has made it: in a child that was forked every
    call is refused, and neither `close` nor the child's end does anything to it. A KeyboardInterrupt comes between two
    steps, and the next call finds the engine as it was.

    `model` is a folder, an id on the Hugging Face hub, or None for the bundled model; or an `OpenModel`, which brings
    its options along. Options have the names of the command line's flags: `LLM(model, tensor_parallel_size=2)`; those
    that are not given may come from environment variables, as docs/flags.md says.

    Raises:
        UserError: model, options and host do not go together; nothing was started.
        EngineError: a rank failed at start.
    """

    def __init__(self, model: str | PathLike[str] | OpenModel | None = None, **options: Any) -> None:
        if not isinstance(model, OpenModel):
            model = open_model(name_of(model), {**from_environment(), **options})
        self._model = model
        self._client = start_engine(self._model)
        self._activity = AWAKE
        self._shared = SharedEngine(self._client)
        self._finalizer = weakref.finalize(self, self._shared.close)
        self._max_model_len = self._client.stats().max_model_len
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
        """Outputs in the order of the prompts: one for each, and one parameters for all prompts or one for each.

        Without parameters the model's own defaults are taken: see `default_sampling_params`.

        Raises:
            RequestError: a prompt or a parameter can't be used; it is named, and nothing was run.
            EngineError: the engine failed. Where it had replicas, it is a ReplicasFailed: none is left, and its
                `outputs` are what had finished.
        """
        many = _as_list(prompts)
        params = self._params(sampling_params, len(many))
        jobs = [_named(i, self.prepare, prompt, params[i]) for i, prompt in enumerate(many)]
        self._grammars.check_jobs(jobs)
        return self._run_all(jobs, use_tqdm)

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
        """Answers to one conversation, or to many, through the model's chat template or the one given.

        Raises:
            RequestError: as `generate`, or the template and the messages do not go together.
            EngineError: the engine failed.
        """
        many = _conversations(messages)
        params = self._params(sampling_params, len(many))
        template = {
            "chat_template": chat_template,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": continue_final_message,
            "tools": tools,
            "chat_template_kwargs": chat_template_kwargs,
        }
        jobs = [_named(i, self.prepare_chat, each, params[i], **template) for i, each in enumerate(many)]
        self._grammars.check_jobs(jobs)
        return self._run_all(jobs, use_tqdm)

    def beam_search(self, prompts: Prompt | Sequence[Prompt], params: BeamSearchParams) -> list[BeamSearchOutput]:
        """The likeliest continuations of each prompt, the best first.

        Raises:
            RequestError: a prompt can't be used; it is named, and nothing was run.
            EngineError: the engine failed.
        """
        if not isinstance(params, BeamSearchParams):
            raise RequestError(f"beam_search takes BeamSearchParams, got {shown(params)}")
        once = SamplingParams(temperature=0, max_tokens=1)
        jobs = [_named(i, self.prepare, prompt, once) for i, prompt in enumerate(_as_list(prompts))]
        return beam_search(
            self._next_tokens,
            [job.tokens for job in jobs],
            params,
            eos=self._model.generation.eos,
            max_model_len=self._max_model_len,
            tokenizer=self._model.tokenizer,
        )

    def _next_tokens(self, beams: Sequence[Sequence[int]], count: int) -> list[dict[int, float]]:
        """The `count` likeliest next tokens of each beam, with their log-probabilities."""
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
        """Raises:
        RequestError: always; the models that are run here write text.
        """
        raise RequestError(
            "embed needs a model that gives embeddings; Shoal runs models that generate text: use generate or chat"
        )

    def default_sampling_params(self, base: SamplingParams | None = None) -> SamplingParams:
        """`base`, with what the model's generation_config.json says for sampling, unless --generation-config vllm.

        Raises:
            RequestError: `base` is no SamplingParams.
        """
        if base is not None and not isinstance(base, SamplingParams):
            raise RequestError(f"default_sampling_params takes SamplingParams or None, got {shown(base)}")
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
        """A prompt made ready for `run`.

        Raises:
            RequestError: it can't be used.
        """
        return self._reader.prepare(index, prompt, params)

    def prepare_chat(self, index: int, messages: Sequence[Message], params: SamplingParams, **template: Any) -> Job:
        """A conversation made ready for `run`; `template` goes to `ChatTemplate.render`.

        Raises:
            RequestError: it can't be used.
        """
        return self._reader.prepare_chat(index, messages, params, **template)

    def run(self, jobs: Iterable[Job | RefusedPrompt], *, ordered: bool = False) -> Iterator[tuple[int, RequestOutput]]:
        """(index, output) as requests finish, or in the order of the jobs; jobs are taken as there is room for them.

        Between two outputs nothing is locked: other calls may go on, of this thread or of others.

        Raises:
            RequestError: the engine is asleep.
        """
        if not self._activity.runs:
            raise RequestError("the engine is asleep: call wake_up() first")
        yield from self._runner.run(jobs, ordered=ordered)  # and so the engine lives as long as this does

    # --- memory ----------------------------------------------------------------------------------------------------

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """Gives the memory of weights and KV cache back to the system, on every rank. At both levels weights are read
        from their files again when it wakes up; level 0 only pauses. `mode` says what becomes of requests: of none
        here, since none may run.

        Raises:
            RequestError: requests run.
            ConfigError: there is no such level, or ranks of other processes compute with these.
            EngineError: the engine failed.
        """
        activity = self._activity.sleep(level)
        if level and self._model.manual_place is not None and self._model.plan.layout.shares_experts:
            raise ConfigError(
                "replicas of other processes compute together with this one, and can't while it is asleep"
            )
        self._become(activity)

    def wake_up(self, tags: Sequence[str] | None = None) -> None:
        """Takes the memory again: all of it, or the parts in `tags` ("weights", "kv_cache").

        Raises:
            CheckpointError: the files of the weights are not what they were; it is still asleep.
            ConfigError: there is no such part.
            EngineError: the engine failed.
        """
        self._become(self._activity.wake_up(tags))

    def is_sleeping(self) -> bool:
        return not self._activity.runs

    def _become(self, activity: Activity) -> None:
        with self._shared.turn():
            if self._activity.runs and not activity.runs:
                stats = self._client.stats()
                if unfinished := stats.running + stats.waiting:
                    raise RequestError(f"{unfinished} requests have not ended: take their outputs to the end first")
            self._client.become(activity)
            self._activity = activity

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """Forgets what the prefix cache has, in every replica. Requests that run keep what they have, unless
        `reset_running_requests`: then they compute it again. There is no connector to another cache to be reset.

        Raises:
            EngineError: the engine failed.
        """
        with self._shared.turn():
            self._client.reset_prefix_cache(running=reset_running_requests)
        return True

    @property
    def engine(self) -> EngineClient:
        """The engine itself, for those who speak in tokens and want to see each step; for one thread, while no call of
        this LLM goes on."""
        self._shared.check()
        return self._client

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def stats(self) -> EngineStats:
        return self._shared.stats()

    def close(self) -> None:
        """Ends engine and ranks, and calls of other threads with a ClosedError. Idempotent."""
        self._finalizer()
        self._grammars_finalizer()

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
            raise RequestError(f"sampling_params must be SamplingParams or a list of them, got {shown(given)}")
        for each in given:
            if not isinstance(each, SamplingParams):
                raise RequestError(f"sampling_params must be SamplingParams or a list of them, got {shown(each)} in it")
        if len(given) != count:
            raise RequestError(
                f"{count} prompts and {len(given)} sampling parameters: give one for all or one for each"
            )
        return given


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, dict):
        return [prompts]
    if isinstance(prompts, bytes) or not isinstance(prompts, Iterable):
        raise RequestError(f"prompts must be a prompt or a list of them, got {shown(prompts)}")
    return list(prompts)


def _conversations(messages: Any) -> list[Sequence[Message]]:
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise RequestError(f"messages must be a list of messages, or a list of such lists, got {shown(messages)}")
    return [messages] if messages and isinstance(messages[0], Mapping) else list(messages)


def _named(index: int, prepare: Callable[..., Job], *arguments: Any, **template: Any) -> Job:
    """One of several: an error says which.

    Raises:
        RequestError: as `prepare`.
    """
    try:
        return prepare(index, *arguments, **template)
    except RequestError as error:
        raise RequestError(f"prompt {index}: {error}") from None
