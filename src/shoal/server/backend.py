"""What the endpoints need of an `AsyncLLM`, as seams."""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from shoal.llm.deltas import Delta
from shoal.outputs import Logprobs, RequestOutput
from shoal.params import Message, Prompt, SamplingParams
from shoal.text.prompts import Job
from shoal.text.tokenizer import Tokenizer


class TokenStream(Protocol):
    @property
    def cached_tokens(self) -> int: ...

    @property
    def prompt_logprobs(self) -> Sequence[Logprobs | None] | None: ...

    @property
    def prompt_complete(self) -> bool: ...

    def __aiter__(self) -> AsyncIterator[Sequence[Delta]]: ...

    async def wait(self) -> RequestOutput: ...

    def close(self) -> None: ...


class Backend(Protocol):
    @property
    def tokenizer(self) -> Tokenizer | None: ...

    @property
    def vocab_size(self) -> int: ...

    @property
    def max_model_len(self) -> int: ...

    @property
    def model_name(self) -> str: ...

    def default_sampling_params(self, base: SamplingParams | None = None) -> SamplingParams: ...

    def prepare(self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True) -> Job: ...

    def prepare_chat(self, messages: Sequence[Message], params: SamplingParams, **template: Any) -> Job: ...

    async def check_grammar(self, job: Job) -> None: ...

    def chat_tokens(self, messages: Sequence[Message], **template: Any) -> tuple[int, ...]: ...

    async def ask(self, verb: str, payload: bytes = b"") -> bytes: ...

    def stream(
        self, job: Job, *, priority: int = 0, replica: int | None = None, timeout: float | None = None
    ) -> TokenStream: ...
