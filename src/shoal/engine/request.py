"""The scheduler's view of a request."""

from dataclasses import dataclass, field
from enum import Enum

from shoal.engine.grammar_constraint import Constraint
from shoal.engine.speculation import Drafter
from shoal.wire.engine import EngineRequest
from shoal.wire.tokens import encode_tokens


class RequestState(Enum):
    CHECKED = "checked"  # new; its grammar must be compiled before it enters the queue
    WAITING = "waiting"
    RUNNING = "running"
    DRAINING = "draining"  # preempted; its results in flight and its verdict must come before it enters the queue again
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """A request and its progress.

    `tokens` are known; `pending` more are planned and not known yet. `computed` counts the tokens whose keys and values
    are in the cache once all plans made so far have run. Drafts are included until they prove wrong.
    """

    message: EngineRequest  # as it arrived
    sort_key: tuple[int, ...]  # given by the policy; the request with the lowest key is served first
    tokens: list[int]
    num_prompt_tokens: int
    salt: str | None  # requests with the same salt share cached blocks; None: it shares none
    stop_ids: frozenset[int] = frozenset()
    constraint: Constraint | None = None
    drafter: Drafter | None = None
    state: RequestState = RequestState.WAITING
    epoch: int = 0
    pending: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)  # its block table
    blocks_retired: int = 0  # leading blocks that were released, since no layer looks at them again
    blocks_cached: int = 0  # leading blocks that the prefix cache knows
    in_flight: int = 0  # plans that include it and whose results have not come
    cached_tokens: int = 0  # tokens of its prompt that were in the prefix cache at admission
    num_drafts: int = 0  # drafts in flight
    prompt_reported: int = 0  # prompt tokens whose log-probabilities are known
    added: float = 0.0  # when it was added, by the engine's clock
    waited_s: float = 0.0  # seconds until its first step; 0 once they were reported to the client
    preemptions: int = 0
    turn: int = 0  # the first step that can include it without waiting for its last token
    most_tokens: int = field(init=False)  # those of its prompt and the most that it may generate
    plain: bool = field(init=False)  # it has no grammar, no drafter, and wants no log-probabilities of its prompt

    def __post_init__(self) -> None:
        self.most_tokens = self.num_prompt_tokens + self.message.max_tokens
        wants_prompt = self.message.sampling.prompt_logprobs >= 0
        self.plain = self.constraint is None and self.drafter is None and not wants_prompt

    @property
    def length(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def num_output_tokens(self) -> int:
        return len(self.tokens) - self.num_prompt_tokens

    @property
    def complete(self) -> bool:
        """Return whether the last token that it may have is known or planned."""
        return len(self.tokens) + self.pending >= self.most_tokens

    @property
    def decodes(self) -> bool:
        """Return whether it needs single tokens from now on: all of its prompt is computed or planned."""
        return not self.complete and self.length - self.computed <= 1

    @property
    def uncomputed(self) -> int:
        """The number of tokens that could be computed now; 0 if the last token that it may have is planned.

        A grammar and a drafter need the last token, so with one of them nothing is planned after an unknown token.
        """
        length = len(self.tokens) + self.pending
        if length >= self.most_tokens:
            return 0
        if self.plain:
            return length - self.computed
        if self.pending and (self.constraint is not None or self.drafter is not None):
            return 0
        if self.constraint is not None and self.constraint.awaited:
            return 0
        return length - self.computed

    def prompt_logprobs_in(self, start: int, count: int) -> int:
        """Return how many prompt tokens get their log-probabilities when `count` tokens from `start` on are computed.

        Each computed token gives the log-probabilities of the next prompt token. 0 if the request wants none.
        """
        if self.message.sampling.prompt_logprobs < 0:
            return 0
        return max(min(start + count, self.num_prompt_tokens - 1) - start, 0)

    @property
    def held_blocks(self) -> list[int]:
        return self.blocks[self.blocks_retired :]

    @property
    def may_reuse_blocks(self) -> bool:
        """Return whether it may start from cached blocks.

        It may not while log-probabilities of its prompt are missing, since they come from computing the prompt.
        """
        wanted = self.num_prompt_tokens - 1 if self.message.sampling.prompt_logprobs >= 0 else 0
        return self.prompt_reported >= wanted

    def encoded_tokens(self) -> bytes:
        """Return the known tokens encoded for a message. Tokens that came with the request are not encoded again."""
        return self.message.tokens + encode_tokens(self.tokens[self.message.num_tokens :])

    def take_waited_us(self) -> int:
        """Return how many microseconds the request waited for its first step; 0 from the second call on."""
        waited, self.waited_s = self.waited_s, 0.0
        return int(waited * 1e6)
