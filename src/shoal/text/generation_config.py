"""What a model's folder says about generating: the tokens that end a text, and defaults of sampling."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoal.errors import CheckpointError, RequestError
from shoal.params import SamplingParams
from shoal.text.tokenizer import read_json

# generation_config.json's name -> ours; those that vLLM takes from there.
_NAMES = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}
_DRAWING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True, slots=True)
class GenerationDefaults:
    eos: tuple[int, ...] = ()  # any of them ends a text; generation_config.json's first, then config.json's
    sampling: Mapping[str, Any] = field(default_factory=dict)  # fields of SamplingParams that the model sets

    @classmethod
    def open(
        cls, folder: Path, *, sampling: bool = True, overrides: Mapping[str, Any] = MappingProxyType({})
    ) -> "GenerationDefaults":
        """From generation_config.json and config.json, neither of which need be there. `sampling`: its defaults too.
        `overrides` stand over config.json.

        Raises:
            CheckpointError: a file is malformed, or a value is out of its range; both are named.
        """
        file = folder / "generation_config.json"
        generation, config = read_json(file), {**read_json(folder / "config.json"), **overrides}
        eos = _ids(generation, file) + _ids(config, folder / "config.json")
        return cls(tuple(dict.fromkeys(eos)), _sampling(generation, file) if sampling else {})

    def defaults(self, base: SamplingParams | None = None) -> SamplingParams:
        """What holds where a request says nothing: the model's values on top of `base`."""
        return dataclasses.replace(base or SamplingParams(), **self.sampling)


def _ids(config: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise CheckpointError(f"{file}: eos_token_id must be a token id or a list of them, got {value!r}")
    return tuple(token for token in ids if token >= 0)  # -1 is written where there is none


def _sampling(generation: Mapping[str, Any], file: Path) -> dict[str, Any]:
    found = {ours: generation[theirs] for theirs, ours in _NAMES.items() if generation.get(theirs) is not None}
    if generation.get("do_sample") is False:  # what it says of drawing, it does not use itself
        found = {name: value for name, value in found.items() if name not in _DRAWING}
    for name, value in found.items():
        try:
            SamplingParams(**{name: value})
        except RequestError as error:
            raise CheckpointError(f"{file}: {error}; mend it, or use --generation-config vllm") from None
    return found
