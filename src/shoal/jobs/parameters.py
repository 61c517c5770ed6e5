"""The sampling parameters of each prompt. Those of its line override flags, flags the model's defaults, these ours."""

from collections.abc import Callable, Mapping
from typing import Any

from shoal.jobs import openai_batch
from shoal.jobs.entries import JobEntry
from shoal.params import SamplingParams


class JobParameters:
    """The sampling parameters of all prompts of a job."""

    def __init__(
        self,
        base: SamplingParams,
        flags: Mapping[str, Any],
        with_model_defaults: Callable[[SamplingParams], SamplingParams] = lambda params: params,
    ) -> None:
        """Prepare the parameters of prompts that set none.

        Args:
            base: our defaults.
            flags: the parameters that were given for all prompts.
            with_model_defaults: puts the model's defaults over ours.

        Raises:
            RequestError: a flag's value is out of its range.
        """
        self._flags = dict(flags)
        self._common = SamplingParams.from_dict(self._flags, with_model_defaults(base))
        self._by_endpoint = {
            endpoint: SamplingParams.from_dict(self._flags, with_model_defaults(openai_batch.defaults(endpoint)))
            for endpoint in openai_batch.ENDPOINTS
        }

    def for_entry(self, entry: JobEntry) -> SamplingParams:
        """Return the parameters of a prompt.

        Raises:
            RequestError: its line has a parameter that is unknown or out of its range.
        """
        base = self._common if entry.endpoint is None else self._by_endpoint[entry.endpoint]
        return SamplingParams.from_dict(entry.sampling, base) if entry.sampling else base
