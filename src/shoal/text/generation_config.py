"""Reading a model folder's settings for generation: the end-of-text tokens, and defaults of sampling parameters."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoal.errors import CheckpointError, RequestError
from shoal.params import SamplingParams
from shoal.text.tokenizer import read_json

# Name in generation_config.json -> our name, for the fields that vLLM reads too.
_FIELDS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_OF_RANDOM_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    """The settings for generation in a model's folder."""

    eos: tuple[int, ...] = ()  # end-of-text tokens: those of generation_config.json first, then those of config.json
    sampling: Mapping[str, Any] = field(default_factory=dict)  # fields of SamplingParams that the model sets

    @classmethod
    def open(
        cls, folder: Path, *, sampling: bool = True, overrides: Mapping[str, Any] = MappingProxyType({})
    ) -> "GenerationDefaults":
        """Read generation_config.json and config.json, each of which may be missing.

        Args:
            sampling: whether to read the defaults of sampling parameters.
            overrides: are applied to config.json.

        Raises:
            CheckpointError: a file is malformed, or a value is out of range; the message names them.
        """
        file = folder / "generation_config.json"
        generation, config = read_json(file), {**read_json(folder / "config.json"), **overrides}
        eos = _ids(generation, file) + _ids(config, folder / "config.json")
        return cls(tuple(dict.fromkeys(eos)), _sampling(generation, file) if sampling else {})

    def defaults(self, base: SamplingParams | None = None) -> SamplingParams:
        """Return the parameters for a request that sets none: `base` with the model's values in their place."""
        return dataclasses.replace(base or SamplingParams(), **self.sampling)


def _ids(config: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise CheckpointError(f"{file}: eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(token for token in ids if token >= 0)  # some files write -1 for no token


def _sampling(generation: Mapping[str, Any], file: Path) -> dict[str, Any]:
    found = {ours: generation[theirs] for theirs, ours in _FIELDS.items() if generation.get(theirs) is not None}
    if generation.get("do_sample") is False:  # the model is meant for greedy decoding, so it does not use these itself
        found = {name: value for name, value in found.items() if name not in _OF_RANDOM_SAMPLING}
    for name, value in found.items():
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            raise CheckpointError(f"{file}: {error}; correct it, or use --generation-config vllm") from None
    return found
