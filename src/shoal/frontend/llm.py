"""`LLM`: offline inference, with vLLM's names."""

import os
import weakref
from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from types import TracebackType
from typing import Any

from tqdm import tqdm

from shoal import wire
from shoal.config import EngineOptions
from shoal.errors import RequestError
from shoal.frontend.compose import build_engine
from shoal.frontend.model import OpenModel, open_model
from shoal.frontend.offline import OfflineRunner
from shoal.frontend.prompts import Job
from shoal.lazy import load
from shoal.protocols import EngineClient
from shoal.types import Prompt, RequestOutput, SamplingParams

_START_PHASES = 5  # each of which may take --start-timeout


class LLM:
    """A model, its ranks, and an engine that keeps them busy. Close it, or use it in a `with`.

    `model` is a folder, an id on the Hugging Face hub, or None for the bundled model; or an `OpenModel`, which brings
    its options along. Options have the names of the command line's flags: `LLM(model, tensor_parallel_size=2)`.

    Raises:
        UserError: model, options and host do not go together; nothing was started.
        EngineError: a rank failed at start.
    """

    def __init__(self, model: str | PathLike[str] | OpenModel | None = None, **options: Any) -> None:
        if not isinstance(model, OpenModel):
            model = open_model(None if model is None else os.fspath(model), options)
        self._model = model
        self._client = self._start()
        self._finalizer = weakref.finalize(self, self._client.close)
        max_model_len = self._client.stats().max_model_len
        self._reader = self._model.reader(max_model_len)
        self._runner = OfflineRunner(
            self._client,
            self._model.tokenizer,
            eos=self._model.eos,
            max_model_len=max_model_len,
            seed=self.options.model_options.seed,
        )

    def _start(self) -> EngineClient:
        if not self.options.parallel.engine_process:
            return build_engine(self.options, self._model.decision, own_process=self._model.own_process)
        inner = {name: value for name, value in self._model.given.items() if name != "engine_process"}
        parallel = self.options.parallel
        client: EngineClient = load("shoal.cluster.replica:EngineProcess")(
            self.options.model,
            inner,
            start_timeout=parallel.start_timeout * _START_PHASES,
            answer_timeout=parallel.step_timeout * (self.options.scheduler.max_in_flight + 1),
        )
        return client

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

        Raises:
            RequestError: a prompt or a parameter can't be used; it is named, and nothing was run.
            EngineError: the engine failed.
        """
        many = _as_list(prompts)
        params = self._params(sampling_params, len(many))
        jobs = [self._prepare(i, prompt, params[i]) for i, prompt in enumerate(many)]
        outputs = dict(tqdm(self.run(jobs), total=len(jobs), disable=not use_tqdm, unit=" prompts"))
        return [outputs[i] for i in range(len(jobs))]

    def prepare(self, index: int, prompt: Prompt, params: SamplingParams) -> Job:
        """A prompt made ready for `run`.

        Raises:
            RequestError: it can't be used.
        """
        return self._reader.prepare(index, prompt, params)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[int, RequestOutput]]:
        """(index, output) as requests finish; jobs are taken as there is room for them."""
        return self._runner.run(jobs)

    @property
    def engine(self) -> EngineClient:
        """The engine itself, for those who speak in tokens and want to see each step."""
        return self._client

    @property
    def vocab_size(self) -> int:
        return self._model.vocab_size

    def stats(self) -> wire.EngineStats:
        return self._client.stats()

    def close(self) -> None:
        """Ends engine and ranks. Idempotent."""
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _prepare(self, index: int, prompt: Prompt, params: SamplingParams) -> Job:
        try:
            return self._reader.prepare(index, prompt, params)
        except RequestError as error:
            raise RequestError(f"prompt {index}: {error}") from None

    def _params(self, given: SamplingParams | Sequence[SamplingParams] | None, count: int) -> Sequence[SamplingParams]:
        if given is None or isinstance(given, SamplingParams):
            return [given or SamplingParams()] * count
        if len(given) != count:
            raise RequestError(
                f"{count} prompts and {len(given)} sampling parameters: give one for all or one for each"
            )
        return given


def _as_list(prompts: Prompt | Sequence[Prompt]) -> Sequence[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    return [prompts] if isinstance(prompts, dict) else list(prompts)
