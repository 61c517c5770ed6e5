"""The models of a job, read once, for the plans of all hosts."""

from dataclasses import dataclass
from pathlib import Path

from shoal.config.engine_options import ModelOptions
from shoal.errors import ConfigError
from shoal.models.implementation import read_model
from shoal.models.model_folder import OpenedModel, open_model
from shoal.models.spec import ModelSpec
from shoal.wire.base import replace_fields
from shoal.wire.plan import ModelFiles


@dataclass(frozen=True, slots=True)
class OpenedModels:
    """The served model and its draft model, with the headers of their weights."""

    model: OpenedModel
    draft: OpenedModel | None
    files: ModelFiles  # with the states of the files


class ModelReader:
    """A reader of the served model and its draft model: first config.json, later the headers of the weights.

    Planners check options against config.json before they open the weights, which takes longer.
    """

    def __init__(self, options: ModelOptions, files: ModelFiles) -> None:
        """Read config.json of both models.

        Args:
            files: the folders of the models, and the state in which their files must be if they were read before.

        Raises:
            UserError: a config.json cannot be read, or the models do not go together.
        """
        self._options = options
        self._files = files
        self._opened: OpenedModels | None = None
        self.spec: ModelSpec = read_model(Path(files.folder), options.model_impl, options.hf_overrides or {})
        self.draft_spec = read_model(Path(files.draft_folder), "auto") if files.draft_folder else None
        if self.draft_spec is not None and self.draft_spec.vocab_size != self.spec.vocab_size:
            raise ConfigError(
                f"the draft model {files.draft_folder} has a vocabulary of {self.draft_spec.vocab_size} tokens, but "
                f"the model has one of {self.spec.vocab_size}: choose a draft model with the same vocabulary"
            )

    def open(self) -> OpenedModels:
        """Return both models, with the headers of their weights. They are read at the first call.

        Raises:
            CheckpointError: the weights are missing or damaged, do not fit config.json, or have changed.
        """
        if self._opened is None:
            self._opened = self._open()
        return self._opened

    def _open(self) -> OpenedModels:
        files, options = self._files, self._options
        weights, quantization = options.load_format != "dummy", options.quantization or ""
        model = open_model(
            *(Path(files.folder), self.spec, options.model_impl, options.hf_overrides or {}),
            weights=weights,
            state=files.state,
            quantization=quantization,
        )
        if self.draft_spec is None:
            return OpenedModels(model, None, replace_fields(files, state=model.state))
        folder = Path(files.draft_folder)
        draft = open_model(
            *(folder, self.draft_spec, "auto", {}),
            weights=weights,
            state=files.draft_state,
            quantization=quantization,
        )
        return OpenedModels(model, draft, replace_fields(files, state=model.state, draft_state=draft.state))
