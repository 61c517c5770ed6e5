"""A request as the scheduler sees it."""

import array
import sys
from dataclasses import dataclass, field
from enum import Enum

from shoal import wire


class State(Enum):
    WAITING = "waiting"
    RUNNING = "running"
    DRAINING = "draining"  # preempted; waits for its results in flight before it may wait again
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """`tokens` are known; `pending` more have been asked for and are not known yet. `computed` counts tokens whose
    keys and values are in the cache once all plans made so far have run."""

    spec: wire.EngineRequest
    arrival: int
    rank: tuple[int, ...]  # the policy's: lowest first
    tokens: list[int]
    prompt_len: int
    state: State = State.WAITING
    epoch: int = 0
    pending: int = 0
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    blocks_cached: int = 0  # leading blocks that the prefix cache has been told of
    in_flight: int = 0  # plans made that include it and have not come back
    cached_tokens: int = 0  # of its prompt, found in the prefix cache at admission

    @property
    def length(self) -> int:
        return len(self.tokens) + self.pending

    @property
    def uncomputed(self) -> int:
        """Tokens that could be computed now; 0 when the last one allowed is on its way."""
        if self.length - self.prompt_len >= self.spec.max_tokens:
            return 0
        return self.length - self.computed


def decode_tokens(data: bytes) -> list[int]:
    tokens = array.array("i", data)
    if sys.byteorder == "big":
        tokens.byteswap()
    return tokens.tolist()


def encode_tokens(tokens: list[int]) -> bytes:
    data = array.array("i", tokens)
    if sys.byteorder == "big":
        data.byteswap()
    return data.tobytes()
