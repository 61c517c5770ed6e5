"""A fake `shoal.server.backend.Backend`. It answers with given texts, in pieces, at once or when a test allows it."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import shoal
from shoal.config.engine_options import EngineOptions
from shoal.llm.deltas import Delta
from shoal.outputs import CompletionOutput, FinishReason, Logprob, Logprobs, RequestOutput
from shoal.params import Message, Prompt, SamplingParams
from shoal.server.api.responses.response_store import ResponseStore
from shoal.server.settings import ServerSettings
from shoal.structured.matcher import GrammarState, Vocabulary
from shoal.text.chat_template import ChatTemplate
from shoal.text.prompts import Job, PromptReader
from shoal.text.token_offsets import TokenOffsets
from shoal.text.tokenizer import Tokenizer, open_tokenizer
from shoal.wire.base import encode
from shoal.wire.engine import ResetOutcome
from shoal.wire.fleet import FleetStatus, Operation
from support.fleet_status import fleet, replica

DEMO = Path(shoal.__file__).parent / "demo_model"
VOCAB_SIZE = 4096
T = TypeVar("T")
Script = Callable[[Job], Sequence[str]]  # what is said to a job, in pieces; each is cut into tokens


@cache
def vocabulary() -> Vocabulary:
    return Vocabulary((DEMO / "tokenizer.json").read_text("utf-8"), (), VOCAB_SIZE)


@cache
def demo_tokenizer() -> Tokenizer:
    found = open_tokenizer(DEMO)
    assert found is not None
    return found


class FakeStream:
    def __init__(self, backend: "FakeBackend", job: Job, error: Exception | None) -> None:
        self.job = job
        self.closed = False
        self.cached_tokens = 3
        self._backend = backend
        self._error = error
        order = range(job.params.n)[:: -1 if backend.last_first else 1]
        self._deltas = [delta for index in order for delta in backend.deltas(job, index)]
        self._given = 0

    @property
    def prompt_logprobs(self) -> tuple[Logprobs | None, ...] | None:
        wanted = self.job.params.prompt_logprobs
        if wanted is None:
            return None
        known = any(delta.index == 0 for delta in self._deltas[: self._given])
        return (None, *(self._backend.logprobs(token, wanted) if known else None for token in self.job.tokens[1:]))

    @property
    def prompt_complete(self) -> bool:
        return None not in (self.prompt_logprobs or ())[1:]

    def __aiter__(self) -> "FakeStream":
        return self

    async def __anext__(self) -> Sequence[Delta]:
        await asyncio.sleep(0)
        if self._error is not None and self._given >= self._backend.fail_after:
            raise self._error
        if self.closed or self._given == len(self._deltas):
            raise StopAsyncIteration
        if self._backend.gate is not None:
            await self._backend.gate.acquire()
        self._given += 1
        return [self._deltas[self._given - 1]]

    async def wait(self) -> RequestOutput:
        async for _ in self:
            pass
        outputs = []
        for index in range(self.job.params.n):
            mine = [delta for delta in self._deltas if delta.index == index]
            logprobs = None if mine[0].logprobs is None else tuple(p for delta in mine for p in delta.logprobs or ())
            tokens = tuple(token for delta in mine for token in delta.token_ids)
            text = "".join(delta.text for delta in mine)
            last = mine[-1]
            offsets = None if logprobs is None else tuple(each for delta in mine for each in delta.text_offsets or ())
            outputs.append(
                CompletionOutput(index, text, tokens, last.finish_reason, None, logprobs, last.stop_reason, offsets)
            )
        return RequestOutput(
            "0", self.job.prompt, self.job.tokens, tuple(outputs), self.cached_tokens,
            prompt_logprobs=self.prompt_logprobs,
        )  # fmt: skip

    def close(self) -> None:
        self.closed = True


class FakeBackend:
    """A model with the bundled tokenizer that answers a job with `says(job)`, and a fleet whose status is `status()`.

    `error` ends each stream after `fail_after` pieces. With a `gate`, each piece needs a permit of it. `last_first`:
    the outputs of a prompt come in reverse order, one after the other; prompt log-probabilities still come with output
    0. `ask` answers `verbs`, and those of a store of responses. `scale` and `operate` raise `refusal`, and record their
    arguments in `scaled` and `operations`.
    """

    model_name = "demo"
    max_model_len = 512

    def __init__(
        self,
        says: Script = lambda _: ["Hello", ", ", "wörld 🐟"],
        *,
        error: Exception | None = None,
        fail_after: int = 0,
        finish: FinishReason = "stop",
        gate: asyncio.Semaphore | None = None,
        last_first: bool = False,
        status: Callable[[], FleetStatus] = lambda: fleet(replica(0)),
        verbs: Mapping[str, Callable[[bytes], bytes]] | None = None,
        refusal: Exception | None = None,
    ) -> None:
        self.says = says
        self.error = error
        self.fail_after = fail_after
        self.finish = finish
        self.gate = gate
        self.last_first = last_first
        self.streams: list[FakeStream] = []
        self.names: list[str] = []
        self.places: list[tuple[int, int | None]] = []
        self.refusal = refusal
        self.scaled: list[int] = []
        self.operations: list[Operation] = []
        self.closed = False
        self._status = status
        self._tokenizer = demo_tokenizer()
        self.vocab_size = VOCAB_SIZE
        self.options = EngineOptions.from_flat(None, {})
        self._reader = PromptReader(
            self._tokenizer, vocab_size=self.vocab_size, max_model_len=self.max_model_len,
            chat_template=lambda: ChatTemplate.open(DEMO),
        )  # fmt: skip
        self.store = ResponseStore.of(ServerSettings())
        self.verbs: dict[str, Callable[[bytes], bytes]] = {"started": lambda _: b"yes", **(verbs or {})}

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    async def ready(self) -> None: ...

    async def status(self) -> FleetStatus:
        return self._status()

    async def scale(self, replicas: int) -> FleetStatus:
        self.scaled.append(replicas)
        return self._unless_refused(self._status)

    async def operate(self, wanted: Operation) -> bytes:
        self.operations.append(wanted)
        answer = encode(ResetOutcome(7, 2)) if wanted.verb == "reset_prefix_cache" else b""
        return self._unless_refused(lambda: answer)

    def _unless_refused(self, answer: Callable[[], T]) -> T:
        if self.refusal is not None:
            raise self.refusal
        return answer()

    async def ask(self, verb: str, payload: bytes = b"", *, patient: bool = False) -> bytes:
        return (self.store.verbs | self.verbs)[verb](payload)

    async def drain(self, timeout: float) -> bool:
        return True

    def close(self) -> None:
        self.closed = True

    def default_sampling_params(self, base: SamplingParams | None = None) -> SamplingParams:
        return base or SamplingParams()

    def prepare(self, prompt: Prompt, params: SamplingParams, *, add_special_tokens: bool = True) -> Job:
        return self._reader.prepare(0, prompt, params, add_special_tokens=add_special_tokens)

    def prepare_chat(self, messages: Sequence[Message], params: SamplingParams, **template: Any) -> Job:
        return self._reader.prepare_chat(0, messages, params, **template)

    async def check_grammar(self, job: Job) -> None:
        """Check the grammar in this process, since tests do not use hostile ones."""
        if job.grammar:
            GrammarState.compile(job.grammar, vocabulary())

    def chat_tokens(self, messages: Sequence[Message], **template: Any) -> tuple[int, ...]:
        return self._reader.chat_tokens(messages, **template)

    def stream(
        self,
        job: Job,
        *,
        priority: int = 0,
        replica: int | None = None,
        timeout: float | None = None,
        name: str = "",
    ) -> FakeStream:
        self.places.append((priority, replica))
        self.names.append(name)
        self.streams.append(FakeStream(self, job, self.error))
        return self.streams[-1]

    def deltas(self, job: Job, index: int) -> list[Delta]:
        pieces = list(self.says(job))
        offsets_of = TokenOffsets(self._tokenizer, skip_special_tokens=True)
        stream = self._tokenizer.stream(job.tokens)
        found = []
        for at, piece in enumerate(pieces):
            tokens = tuple(self._tokenizer.encode(piece, add_special_tokens=False))
            wanted = job.params.logprobs
            logprobs = None if wanted is None else tuple(self.logprobs(token, wanted) for token in tokens)
            finish = self.finish if at == len(pieces) - 1 else None
            for token in tokens:
                offsets_of.add(token, stream.push(token))
            offsets = None if wanted is None else tuple(offsets_of.offsets[-len(tokens) :])
            found.append(Delta(index, piece, tokens, logprobs, finish, text_offsets=offsets))
        return found

    def logprobs(self, token: int, count: int) -> Logprobs:
        """Return the log-probabilities of a draw in which the token comes second, after token 5."""
        return {token: self._logprob(token, -1.5, 2)} | ({5: self._logprob(5, -0.5, 1)} if count and token != 5 else {})

    def _logprob(self, token: int, value: float, rank: int) -> Logprob:
        return Logprob(value, rank, self._tokenizer.token_text(token), self._tokenizer.token_bytes(token))
