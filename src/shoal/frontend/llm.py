"""`LLM`: offline inference, with vLLM's names."""

import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any

from tqdm import tqdm

from shoal import wire
from shoal.config import EngineOptions
from shoal.errors import RequestError
from shoal.frontend import hub
from shoal.frontend.compose import build_engine, decide
from shoal.frontend.offline import Job, OfflineRunner
from shoal.frontend.tokenizer import Tokenizer, eos_tokens, open_tokenizer
from shoal.lazy import load
from shoal.protocols import EngineClient
from shoal.types import Prompt, RequestOutput, SamplingParams


class LLM:
    """A model, its ranks, and an engine that keeps them busy. Close it, or use it in a `with`.

    `model` is a folder, an id on the Hugging Face hub, or None for the bundled model. Options have the names of the
    command line's flags: `LLM(model, tensor_parallel_size=2, dtype="bfloat16")`.

    Raises:
        UserError: model, options and host do not go together; nothing was started.
        EngineError: a rank failed at start.
    """

    def __init__(self, model: str | None = None, **options: Any) -> None:
        own_process = bool(options.pop("_own_process", False))
        if hub.is_shape(model):
            options.setdefault("load_format", "dummy")
        self.options = EngineOptions.from_flat(model or "", options)
        decision = decide(self.options)
        self._tokenizer: Tokenizer | None = None
        self._client: EngineClient
        begun = time.monotonic()
        if self.options.parallel.engine_process:
            timeout = self.options.parallel.start_timeout
            inner = {name: value for name, value in options.items() if name != "engine_process"}
            self._client = load("shoal.cluster.replica:EngineProcess")(model, inner, timeout)
        else:
            self._client = build_engine(self.options, decision, own_process=own_process)
        self._finalizer = weakref.finalize(self, self._client.close)
        self.start_seconds = time.monotonic() - begun
        self._tokenizer = open_tokenizer(decision.folder)
        self._eos = eos_tokens(decision.folder)
        self._spec = decision.spec
        stats = self._client.stats()
        self._runner = OfflineRunner(
            self._client,
            self._tokenizer,
            eos=self._eos,
            vocab_size=self._spec.vocab_size,
            max_model_len=stats.max_model_len,
            seed=self.options.model_options.seed,
        )

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
        return self._runner.prepare(index, prompt, params)

    def run(self, jobs: Iterable[Job]) -> Iterator[tuple[int, RequestOutput]]:
        """(index, output) as requests finish; jobs are taken as there is room for them."""
        return self._runner.run(jobs)

    @property
    def engine(self) -> EngineClient:
        """The engine itself, for those who speak in tokens and want to see each step."""
        return self._client

    @property
    def vocab_size(self) -> int:
        return self._spec.vocab_size

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
            return self._runner.prepare(index, prompt, params)
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
