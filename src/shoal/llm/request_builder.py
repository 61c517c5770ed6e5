"""The builder of engine requests: it turns a prepared prompt into one request for each of its outputs."""

import hashlib
from collections.abc import Sequence

from shoal.params import SamplingParams
from shoal.text.prompts import Job
from shoal.wire.base import replace_fields
from shoal.wire.engine import EngineRequest
from shoal.wire.ranks import Sampling, SamplingPenalties
from shoal.wire.tokens import encode_numbers, encode_tokens

_MOST = 2**31 - 1  # more tokens than any vocabulary or output has
_SEED_BITS = 0xFFFFFFFFFFFFFFFF


class RequestBuilder:
    """A builder of the requests for an engine."""

    def __init__(self, eos: Sequence[int], *, max_model_len: int, seed: int) -> None:
        """Set what all requests have in common.

        Args:
            eos: the tokens that end a text.
            max_model_len: the most tokens that a prompt and its output may have together.
            seed: requests without a seed get one that is derived from this and from their number.
        """
        self.max_model_len = max_model_len
        self.eos = tuple(eos)
        self._seed = seed

    def build(self, job: Job, first: int) -> list[EngineRequest]:
        """Return the requests for the outputs of a prompt, numbered from `first` on.

        They have the seed and the prompt in common, and share its blocks. Equal fields are the same object in all of
        them, so that a long prompt is not encoded again for each output.
        """
        params = job.params
        stop_ids = encode_tokens((*(params.stop_token_ids or ()), *(() if params.ignore_eos else self.eos)))
        sampling = self._sampling(job, first, stop_ids)
        request = EngineRequest(
            seq=first,
            tokens=encode_tokens(job.tokens),
            num_prompt_tokens=len(job.tokens),
            sampling=sampling,
            max_tokens=min(params.max_tokens or _MOST, self.max_model_len - len(job.tokens)),
            stop_ids=stop_ids,
            group=first if params.n > 1 else -1,
            grammar=job.grammar,
            cache_salt=_digest(job.cache_salt),
            outputs=max(job.outputs, params.n),
            name=str(job.index),
        )
        others = [
            replace_fields(
                request,
                seq=first + index,
                sampling=replace_fields(sampling, sample_index=index, prompt_logprobs=-1),
            )
            for index in range(1, params.n)
        ]
        return [request, *others]

    def _sampling(self, job: Job, first: int, stop_ids: bytes) -> Sampling:
        """Return the sampling parameters of the first output."""
        params = job.params
        bias = params.logit_bias or {}
        return Sampling(
            seed=self._seed_of(first) if params.seed is None else params.seed & _SEED_BITS,
            temperature=params.temperature,
            top_k=min(max(params.top_k, 0), _MOST),
            top_p=params.top_p,
            min_p=params.min_p,
            penalties=_penalties(params),
            min_tokens=min(params.min_tokens, _MOST),
            ends=stop_ids if params.min_tokens else b"",
            bias_ids=encode_tokens(bias),
            bias_values=encode_numbers(bias.values()),
            allowed=None if params.allowed_token_ids is None else encode_tokens(params.allowed_token_ids),
            banned=job.banned,
            logprobs=_count(params.logprobs),
            prompt_logprobs=_count(params.prompt_logprobs),
        )

    def _seed_of(self, seq: int) -> int:
        digest = hashlib.blake2b(f"{self._seed}:{seq}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


def _digest(salt: str) -> str:
    """Return a digest of a cache salt, which may have any length and any characters."""
    return hashlib.sha256(salt.encode("utf-8", "surrogatepass")).hexdigest() if salt else ""


def _penalties(params: SamplingParams) -> SamplingPenalties | None:
    found = SamplingPenalties(params.presence_penalty, params.frequency_penalty, params.repetition_penalty)
    return None if found == SamplingPenalties() else found


def _count(wanted: int | None) -> int:
    """Return for how many of the likeliest tokens log-probabilities are wanted; -1: for none.

    A user asks for all tokens of the vocabulary with -1, and for none with None.
    """
    if wanted is None:
        return -1
    return _MOST if wanted == -1 else min(wanted, _MOST)
