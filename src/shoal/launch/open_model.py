"""A model that was found, read and decided on; nothing has been started."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from os import PathLike
from pathlib import Path
from typing import Any

from shoal import env
from shoal.addresses import joined, refuse_hidden_loopback
from shoal.config import vllm_options
from shoal.config.engine_options import EngineOptions, refuse_online
from shoal.devices import cpu
from shoal.errors import ConfigError
from shoal.launch import hub
from shoal.launch.deployment import Deployment
from shoal.log import get_logger
from shoal.params import SamplingParams
from shoal.planner.resolve import Decision, discover, resolve
from shoal.process import open_files
from shoal.text.chat_template import ChatTemplate
from shoal.text.generation_config import GenerationDefaults
from shoal.text.grammar_checker import GrammarChecker
from shoal.text.grammar_host import grammar_pool
from shoal.text.prompts import PromptReader
from shoal.text.tokenizer import Tokenizer, open_tokenizer
from shoal.values import shown
from shoal.wire.base import replace_fields
from shoal.wire.plan import ModelFiles, ReplicaPlace

log = get_logger("model")


@dataclass(frozen=True, slots=True)
class OpenModel:
    options: EngineOptions
    given: Mapping[str, Any]  # the options as they were given
    decision: Decision
    tokenizer: Tokenizer | None
    generation: GenerationDefaults
    own_process: bool  # this process has no other purpose, and may be bound to cores
    by_hand: ReplicaPlace | None = None  # of this process among replicas that the user starts, one a process

    @property
    def name(self) -> str:
        """As it was given, or the name of the bundled model."""
        return self.options.model or hub.BUNDLED_NAME

    @property
    def files(self) -> ModelFiles:
        """Where the model and its draft model are, and in what state: a process that is started later finds the same,
        whatever the working directory, or the hub, is by then."""
        decision = self.decision
        draft = "" if decision.draft_folder is None else str(decision.draft_folder)
        return ModelFiles(str(decision.folder), draft, *decision.file_states)

    @property
    def vocab_size(self) -> int:
        return self.decision.spec.vocab_size

    def reader(self, max_model_len: int | None = None) -> PromptReader:
        """Checks prompts; before the start by the length that was decided on, later by the engine's own."""
        return PromptReader(
            self.tokenizer,
            vocab_size=self.vocab_size,
            max_model_len=max_model_len or self.decision.max_model_len,
            eos=self.generation.eos,
            chat_template=cache(lambda: ChatTemplate.open(self.decision.folder)),
        )

    def grammar_checker(self) -> GrammarChecker:
        """Finds out whether structured outputs can be obeyed; starts nothing before the first one comes."""
        decision, eos = self.decision, self.generation.eos
        return GrammarChecker(
            lambda: grammar_pool(decision.folder, eos, decision.spec.vocab_size, decision.hardware.cores)
        )

    def default_sampling_params(self, base: SamplingParams | None = None) -> SamplingParams:
        """`base`, with what the model's generation_config.json says for sampling, unless --generation-config vllm."""
        return self.generation.defaults(base)


def name_of(model: object) -> str | None:
    """What a user may call a model by.

    Raises:
        ConfigError: it is neither a text nor a path nor None.
    """
    name = os.fspath(model) if isinstance(model, PathLike) else model
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"model must be a folder, an id on the Hugging Face hub or None, got {shown(model)}")
    return name


def open_model(
    model: str | None,
    given: Mapping[str, Any],
    *,
    own_process: bool = False,
    online: bool = False,
    replicas_elsewhere: bool = False,
    files: ModelFiles | None = None,
) -> OpenModel:
    """`model` is a folder, an id on the hub, a shape, or None for the bundled model. Without `online`, options that
    only mean something to what serves are refused; vLLM's that change nothing are noted in the log.
    `replicas_elsewhere`: another process has them, and has decided whether this host's memory and devices do; here they
    are not looked at. `files`: where the model was found, and in what state.

    Raises:
        UserError: model, options and host do not go together; it says what, and the way out.
    """
    open_files.occupy_standard()  # before anything opens a socket
    if hub.is_shape(model):
        given = {"load_format": "dummy", **given}
    given, notes = vllm_options.take(given, server=online)
    options = EngineOptions.from_flat(model, given)
    for note in notes:
        log.info("%s", note)
    if not online:
        refuse_online(given)
    by_hand = _place_by_hand(options)
    if online and by_hand is not None:
        raise ConfigError(
            f"SHOAL_DP_RANK={by_hand.rank} is for programs that are replicas by hand: to serve one replica, use "
            f"--data-parallel-size {by_hand.size} --data-parallel-rank {by_hand.rank}, and unset the variable"
        )
    place = by_hand or Deployment.of(options).place
    if replicas_elsewhere:
        place = replace_fields(place, size=options.parallel.data_parallel_size, local_size=0)
    decision = decide(options, place, files)
    from_model = options.model_options.generation_config != "vllm"
    generation = GenerationDefaults.open(decision.folder, sampling=from_model, overrides=decision.overrides)
    return OpenModel(options, given, decision, open_tokenizer(decision.folder), generation, own_process, by_hand)


def _place_by_hand(options: EngineOptions) -> ReplicaPlace | None:
    """What SHOAL_DP_* say; None where they are not set, or the process is alone."""
    found = env.data_parallel()
    asked = options.parallel.data_parallel_size
    if found is None or found.size == 1:
        return None
    if asked not in (1, found.size):
        raise ConfigError(
            f"--data-parallel-size {asked}, and SHOAL_DP_SIZE is {found.size}: leave one of them out; with the "
            "variables set, each replica is a process of its own"
        )
    if found.size_local < found.size:
        refuse_hidden_loopback(found.master_ip, "SHOAL_DP_MASTER_IP")
    if found.local_assumed:
        log.warning(
            "rank %d counts on having this host to itself: set SHOAL_DP_RANK_LOCAL and SHOAL_DP_SIZE_LOCAL if several "
            "ranks share it",
            found.rank,
        )
    return ReplicaPlace(
        found.rank,
        found.size,
        local_rank=found.rank_local,
        local_size=found.size_local,
        rendezvous=joined(found.master_ip, found.master_port),
        key=env.cluster_key(),
    )


def decide(options: EngineOptions, place: ReplicaPlace | None = None, files: ModelFiles | None = None) -> Decision:
    """Everything that can be refused before a process is started, is refused here. `place`: of one replica; without it
    the decision is for all of them. `files`: those of the decision that was made first; without it the model is looked
    for.

    Raises:
        UserError: as `open_model`.
    """
    files = files or _find(options)
    place = place or ReplicaPlace()
    hardware = discover(options) if place.local_size else cpu.discover()  # of a front end without replicas: any will do
    draft = Path(files.draft_folder) if files.draft_folder else None
    return resolve(options, Path(files.folder), hardware, draft, place, (files.state, files.draft_state))


def _find(options: EngineOptions) -> ModelFiles:
    """
    Raises:
        UserError: as `hub.locate`.
    """
    weights = options.model_options.load_format != "dummy"
    folder = hub.locate(options.model, options.model_options.revision, weights=weights)
    speculative = options.model_options.speculative_config
    if speculative is None or speculative.method != "draft_model":
        return ModelFiles(str(folder))
    return ModelFiles(str(folder), str(hub.locate(speculative.model, speculative.revision, weights=weights)))
