"""What is sent and when: lengths, prompts that share prefixes, and times of arrival, all drawn from one seed."""

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
    """In tokens; `weight` is the share of requests that have them, in proportion to the others' weights."""

    input_len: int
    output_len: int
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Planned:
    """A request to come. `arrival`: seconds from the start; None: as soon as there is a place for it.

    `prompt_tokens` is what was aimed at; 0 where nobody knows.
    """

    index: int
    arrival: float | None
    prompt: Prompt
    prompt_tokens: int
    max_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """`range_ratio` r: a length is drawn evenly from [len x (1 - r), len x (1 + r)].

    Each prompt begins with one of `num_prefixes` texts of `shared_prefix_len` tokens, the k-th with a probability in
    proportion to 1 / k ^ prefix_zipf; its input length comes on top.
    """

    lengths: Sequence[Lengths]
    range_ratio: float = 0.0
    shared_prefix_len: int = 0
    num_prefixes: int = 1
    prefix_zipf: float = 1.0
    seed: int = 0

    @property
    def longest(self) -> int:
        """Tokens of the longest request that can come, its output counted."""
        return self.shared_prefix_len + max(
            _range(each.input_len, self.range_ratio)[1] + _range(each.output_len, self.range_ratio)[1]
            for each in self.lengths
        )

    def sizes(self) -> Iterator[tuple[int, int]]:
        """(input, output) tokens of one request after the other, without end; prefixes not counted."""
        draw = random.Random(f"{self.seed} lengths")
        weights = list(itertools.accumulate(each.weight for each in self.lengths))
        while True:
            (chosen,) = draw.choices(self.lengths, cum_weights=weights)
            yield (
                draw.randint(*_range(chosen.input_len, self.range_ratio)),
                draw.randint(*_range(chosen.output_len, self.range_ratio)),
            )

    def prefixes(self) -> Iterator[int]:
        """Which prefix each request begins with."""
        draw = random.Random(f"{self.seed} prefixes")
        weights = list(itertools.accumulate(1 / k**self.prefix_zipf for k in range(1, self.num_prefixes + 1)))
        while True:
            yield draw.choices(range(self.num_prefixes), cum_weights=weights)[0]

    def requests(self, prompts: Prompts, arrivals: Iterator[float | None]) -> Iterator[Planned]:
        """As many as there are arrivals."""
        texts = random.Random(f"{self.seed} texts")
        prefixed = self.shared_prefix_len > 0
        shared = [prompts.make(self.shared_prefix_len, texts) for _ in range(self.num_prefixes)] if prefixed else []
        drawn = zip(arrivals, self.sizes(), self.prefixes(), strict=False)
        for index, (arrival, (input_len, output_len), prefix) in enumerate(drawn):
            prompt = prompts.make(input_len, texts, behind=prefixed)
            if prefixed:
                prompt = prompts.join(shared[prefix], prompt)
            yield Planned(index, arrival, prompt, self.shared_prefix_len + input_len, output_len)


def _range(length: int, ratio: float) -> tuple[int, int]:
    return max(1, math.ceil(length * (1 - ratio))), max(1, math.floor(length * (1 + ratio)))


def arrivals(rate: float, burstiness: float, seed: int) -> Iterator[float]:
    """Seconds from the start at which requests come, without end: `rate` a second in the mean, all at once if infinite.

    Gaps have a gamma distribution of shape `burstiness`: 1 is a Poisson process, less comes in bursts, more is even.
    """
    if math.isinf(rate):
        return itertools.repeat(0.0)
    draw = random.Random(f"{seed} arrivals")
    scale = 1 / (rate * burstiness)
    return itertools.accumulate(draw.gammavariate(burstiness, scale) for _ in itertools.count())


def parse_mix(text: str) -> tuple[Lengths, ...]:
    """`128:64@0.7,1024:256@0.3`: input and output tokens, and the share of requests; without any, shares are equal.

    Raises:
        ConfigError: it has another form, or a number is out of range.
    """
    return tuple(_parse_lengths(part, text) for part in text.split(","))


def _parse_lengths(part: str, text: str) -> Lengths:
    sizes, _, weight = part.strip().partition("@")
    input_len, output_len = map(whole_number, sizes.split(":")) if sizes.count(":") == 1 else (None, None)
    share = decimal_number(weight or "1")
    if input_len is None or output_len is None or share is None:
        raise ConfigError(f"{text!r} is no mix of lengths; it has the form INPUT:OUTPUT@SHARE,...")
    lengths = Lengths(input_len, output_len, share)
    if min(input_len, output_len) < 1 or not 0 < lengths.weight < math.inf:
        raise ConfigError(f"lengths are at least 1 and shares positive, not {part.strip()!r} as in {text!r}")
    return lengths
