"""The sampling parameters of each prompt: its own go over the flags, those over the model's, those over ours."""

from collections.abc import Callable, Mapping
from typing import Any

from shoal.jobs import openai_batch
from shoal.jobs.entries import JobEntry
from shoal.params import SamplingParams


class Parameters:
    """`flags` are the parameters that were given for all prompts; `with_model` puts the model's defaults over ours.

    Raises:
        RequestError: a flag's value is out of its range.
    """

    def __init__(
        self,
        base: SamplingParams,
        flags: Mapping[str, Any],
        with_model: Callable[[SamplingParams], SamplingParams] = lambda params: params,
    ) -> None:
        self._flags = dict(flags)
        self._common = SamplingParams.from_dict(self._flags, with_model(base))
        self._of_endpoints = {
            endpoint: SamplingParams.from_dict(self._flags, with_model(openai_batch.defaults(endpoint)))
            for endpoint in openai_batch.ENDPOINTS
        }

    def of(self, entry: JobEntry) -> SamplingParams:
        """
        Raises:
            RequestError: one of the prompt's own parameters is unknown or out of its range.
        """
        base = self._common if entry.endpoint is None else self._of_endpoints[entry.endpoint]
        return SamplingParams.from_dict(entry.sampling, base) if entry.sampling else base
