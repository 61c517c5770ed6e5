"""The seam between the HTTP server and the model it serves. `AsyncLLM` is the implementation."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from shoal.config.engine_options import EngineOptions
from shoal.llm.deltas import Delta
from shoal.outputs import Logprobs, RequestOutput
from shoal.params import Message, Prompt, SamplingParams
from shoal.text.prompts import Job
from shoal.text.tokenizer import Tokenizer
from shoal.wire.fleet import FleetStatus, Operation


class TokenStream(Protocol):
    """The growing outputs of one prompt. Iteration gives new deltas; leaving the loop early ends the request."""

    @property
    def cached_tokens(self) -> int: ...

    @property
    def prompt_logprobs(self) -> Sequence[Logprobs | None] | None: ...

    @property
    def prompt_complete(self) -> bool:
        """True once everything that was asked about the prompt is known."""

    def __aiter__(self) -> AsyncIterator[Sequence[Delta]]: ...

    async def wait(self) -> RequestOutput: ...

    def close(self) -> None: ...


class Backend(Protocol):
    """A model and its fleet, as the HTTP server uses them: all endpoints, and `serve`, which starts and ends it.

    Methods raise a `UserError` for what the caller can mend, an `Unavailable` for what may succeed later, and another
    `EngineError` otherwise. All calls come from one event loop.
    """

    # --- the model -----------------------------------------------------------------------------------------------

    @property
    def options(self) -> EngineOptions: ...

    @property
    def model_name(self) -> str: ...

    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its output may have together; smaller once the replicas know what fits."""

    def default_sampling_params(self, base: SamplingParams | None = None) -> SamplingParams: ...

    # --- requests ------------------------------------------------------------------------------------------------

    def prepare(self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True) -> Job:
        """Prepare a prompt for `stream`. It may take long, so other threads call it too."""

    def prepare_chat(self, messages: Sequence[Message], params: SamplingParams, **template: Any) -> Job: ...

    def chat_tokens(self, messages: Sequence[Message], **template: Any) -> tuple[int, ...]: ...

    async def check_grammar(self, job: Job) -> None: ...

    def stream(
        self,
        job: Job,
        *,
        priority: int = 0,
        replica: int | None = None,
        timeout: float | None = None,
        name: str = "",
    ) -> TokenStream:
        """Begin a request. A caller that neither iterates to the end nor calls `wait` must call `close`.

        `name`: what the client knows it by, for traces.
        """

    # --- the fleet -----------------------------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until every replica of this host can serve requests."""

    async def status(self) -> FleetStatus: ...

    async def scale(self, replicas: int) -> FleetStatus: ...

    async def operate(self, wanted: Operation) -> bytes: ...

    async def ask(self, verb: str, payload: bytes = b"", *, patient: bool = False) -> bytes:
        """Send a request to the process that has the fleet, and return the answer. Each verb has a handler there.

        `patient`: wait for the answer without a deadline.
        """

    async def drain(self, timeout: float) -> bool:
        """Refuse new requests, and wait up to `timeout` seconds for the others. Return True if all have ended."""

    def close(self) -> None:
        """End all replicas and requests. Idempotent."""
