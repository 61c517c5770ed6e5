"""Checks of new requests."""

from collections.abc import Callable

from shoal.engine.grammar_constraint import Constraint
from shoal.engine.request import Request
from shoal.engine.scheduler.limits import SchedulerLimits
from shoal.engine.scheduler.request_table import RequestTable
from shoal.engine.speculation import Drafter
from shoal.errors import RequestError, structured_outputs_error
from shoal.protocols import Policy
from shoal.wire.engine import EngineRequest
from shoal.wire.tokens import decode_tokens, token_set


class Intake:
    """Checks new requests and has the policy decide their order."""

    def __init__(
        self,
        requests: RequestTable,
        limits: SchedulerLimits,
        policy: Policy,
        clock: Callable[[], float],
        *,
        prefix_caching: bool,
        make_drafter: Callable[[], Drafter | None],
        has_grammars: bool,
    ) -> None:
        self._requests = requests
        self._limits = limits
        self._policy = policy
        self._clock = clock
        self._prefix_caching = prefix_caching
        self._make_drafter = make_drafter
        self._has_grammars = has_grammars
        self._arrivals = 0

    def receive(self, message: EngineRequest) -> Request:
        """Make a `Request` from a client's message.

        Raises:
            RequestError: the request can never run. The front end checks prompts too; the engine does not rely on it.
        """
        tokens = decode_tokens(message.tokens)
        prompt = message.num_prompt_tokens
        if not 0 < prompt <= len(tokens):
            raise RequestError(
                f"request {message.seq}: its prompt has {prompt} tokens; it must have 1 to {len(tokens)}", "prompt"
            )
        if prompt + message.max_tokens > self._limits.max_model_len or message.max_tokens < 1:
            raise RequestError(
                f"request {message.seq}: {prompt} prompt tokens and {message.max_tokens} to generate must be at least "
                f"one each, and at most {self._limits.max_model_len} together",
                "max_tokens",
            )
        if self._requests.find(message.seq) is not None:
            raise RequestError(f"request {message.seq} exists already")
        if message.grammar and not self._has_grammars:
            raise structured_outputs_error("needs a tokenizer, which this model does not have")
        self._arrivals += 1
        drafter = self._make_drafter()
        if drafter is not None:
            drafter.accept(tokens, ())
        return Request(
            message,
            sort_key=self._policy.sort_key(message, self._arrivals),
            tokens=tokens,
            num_prompt_tokens=prompt,
            salt=self._salt(message),
            stop_ids=token_set(message.stop_ids),
            constraint=Constraint() if message.grammar else None,
            drafter=drafter,
            added=self._clock(),
        )

    def _salt(self, message: EngineRequest) -> str | None:
        """Return the salt that requests must have in common to share blocks. Without a prefix cache it is the group."""
        if self._prefix_caching:
            return message.cache_salt
        return f"group {message.group}" if message.group >= 0 else None
