"""The requests of a load test: lengths, prompts with shared prefixes and times of arrival, all drawn from one seed."""

import itertools
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from shoal.client.load.prompts import Prompt, Prompts
from shoal.errors import ConfigError
from shoal.values import decimal_number, whole_number


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of prompt and output in tokens. `weight`: the share of requests with them, relative to other weights."""

    input_len: int
    output_len: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class PlannedRequest:
    """A request that will be sent at `arrival`, in seconds from the start; None: as soon as there is a place for it.

    `prompt_tokens` is the intended length of the prompt; 0: not known.
    """

    index: int
    arrival: float | None
    prompt: Prompt
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The distribution of requests.

    With `range_ratio` r, a length is drawn evenly from [len x (1 - r), len x (1 + r)].

    Each prompt begins with one of `num_prefixes` texts of `shared_prefix_len` tokens, the k-th with a probability
    proportional to 1 / k ^ prefix_zipf. The input length is added to the prefix.
    """

    lengths: Sequence[Lengths]
    range_ratio: float = 0.0
    shared_prefix_len: int = 0
    num_prefixes: int = 1
    prefix_zipf: float = 1.0
    seed: int = 0

    @property
    def longest(self) -> int:
        """The most tokens that a request can have, with its output."""
        return self.shared_prefix_len + max(
            _range(each.input_len, self.range_ratio)[1] + _range(each.output_len, self.range_ratio)[1]
            for each in self.lengths
        )

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Yield (input, output) tokens of each request, without end. Shared prefixes are not counted."""
        draw = random.Random(f"{self.seed} lengths")
        weights = list(itertools.accumulate(each.weight for each in self.lengths))
        while True:
            (chosen,) = draw.choices(self.lengths, cum_weights=weights)
            yield (
                draw.randint(*_range(chosen.input_len, self.range_ratio)),
                draw.randint(*_range(chosen.output_len, self.range_ratio)),
            )

    def prefixes(self) -> Iterator[int]:
        """Yield the number of the prefix of each request, without end."""
        draw = random.Random(f"{self.seed} prefixes")
        weights = list(itertools.accumulate(1 / k**self.prefix_zipf for k in range(1, self.num_prefixes + 1)))
        while True:
            yield draw.choices(range(self.num_prefixes), cum_weights=weights)[0]

    def requests(self, prompts: Prompts, arrivals: Iterator[float | None]) -> Iterator[PlannedRequest]:
        """Yield a request for each arrival."""
        texts = random.Random(f"{self.seed} texts")
        prefixed = self.shared_prefix_len > 0
        shared = [prompts.make(self.shared_prefix_len, texts) for _ in range(self.num_prefixes)] if prefixed else []
        drawn = zip(arrivals, self.sizes(), self.prefixes(), strict=False)
        for index, (arrival, (input_len, output_len), prefix) in enumerate(drawn):
            prompt = prompts.make(input_len, texts, joined=prefixed)
            if prefixed:
                prompt = prompts.join(shared[prefix], prompt)
            yield PlannedRequest(index, arrival, prompt, self.shared_prefix_len + input_len, output_len)


def _range(length: int, ratio: float) -> tuple[int, int]:
    return max(1, math.ceil(length * (1 - ratio))), max(1, math.floor(length * (1 + ratio)))


def arrivals(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Yield times of arrival in seconds from the start, without end. All are 0 if the rate is infinite.

    There are `rate` requests per second on average. The gaps have a gamma distribution of shape `burstiness`: with 1
    this is a Poisson process, below 1 requests come in bursts, above 1 they come more evenly.
    """
    if math.isinf(rate):
        return itertools.repeat(0.0)
    draw = random.Random(f"{seed} arrivals")
    scale = 1 / (rate * burstiness)
    return itertools.accumulate(draw.gammavariate(burstiness, scale) for _ in itertools.count())


def parse_mix(text: str) -> tuple[Lengths, ...]:
    """Parse a mix such as `128:64@0.7,1024:256@0.3`: input and output tokens, and the share of requests.

    Lengths without a share have the weight 1.

    Raises:
        ConfigError: the text has another form, or a number is out of range.
    """
    return tuple(_parse_lengths(part, text) for part in text.split(","))


def _parse_lengths(part: str, text: str) -> Lengths:
    sizes, _, weight = part.strip().partition("@")
    input_len, output_len = map(whole_number, sizes.split(":")) if sizes.count(":") == 1 else (None, None)
    share = decimal_number(weight or "1")
    if input_len is None or output_len is None or share is None:
        raise ConfigError(f"{text!r} is not a mix of lengths; use the form INPUT:OUTPUT@SHARE,...")
    lengths = Lengths(input_len, output_len, share)
    if min(input_len, output_len) < 1 or not 0 < lengths.weight < math.inf:
        raise ConfigError(f"lengths must be at least 1 and shares positive; {text!r} has {part.strip()!r}")
    return lengths
