"""Options of vLLM's for which there is nothing to set here, so that scripts run unchanged: one table for flags, config
files, `LLM(...)` and docs/flags.md.

A value that says how things are here anyway is taken, with a note in the log; any other is refused with the nearest
way to what it asks for.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shoal.errors import ConfigError
from shoal.values import shown

ON, OFF, EITHER = ("true",), ("false",), ("true", "false")
ANY_NUMBER = ("a number",)


@dataclass(frozen=True, slots=True)
class Accepted:
    """`values`: those that are taken, as texts; none: it is always refused, with what to do instead."""

    name: str
    values: tuple[str, ...]
    note: str  # how it is here
    instead: str  # of any other value
    server: bool = False  # only for what serves
    needs: str = ""  # another option, without which it means nothing

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def is_switch(self) -> bool:
        return bool(self.values) and set(self.values) <= set(EITHER)

    @property
    def metavar(self) -> str:
        return "NUMBER" if self.values == ANY_NUMBER else "|".join(self.values) or "VALUE"

    def check(self, value: Any, name: str = "") -> None:
        """
        Raises:
            ConfigError: it is another value, and would change something; the message calls the option `name`.
        """
        if (self.values == ANY_NUMBER and _is_number(value)) or _text(value) in self.values:
            return
        name = name or self.flag
        if self.is_switch and _text(value) not in EITHER:
            raise ConfigError(f"{name} takes true or false, got {shown(value)}")
        taken = f" takes {' or '.join(self.values)} here" if self.values and not self.is_switch else " can't be obeyed"
        what = f"{name}{taken}, got {shown(value)}" if not self.is_switch else f"{self._negated}{taken}"
        raise ConfigError(f"{what}: {self.instead}")

    @property
    def _negated(self) -> str:
        return self.flag if self.values == OFF else f"--no-{self.flag[2:]}"


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)[:100]


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value)) and float(value) >= 0
    except (TypeError, ValueError, OverflowError):
        return False


_EAGER = "steps are launched operation by operation, without graphs or compiling"
_TEXT_ONLY = "models are run that read and write text"
TABLE: tuple[Accepted, ...] = (
    Accepted("enable_chunked_prefill", ON, "prompts are always computed in chunks of what a step has room for",
        "a larger --max-num-batched-tokens makes the chunks as long as the prompts"),
    Accepted("async_scheduling", ON, "steps are always planned before the ones under way have ended",
        "--max-in-flight 1 plans each step behind the one before"),
    Accepted("enable_fault_tolerance", ON, "replicas that end are always started again, and their requests go on",
        "--max-restarts 0 starts none again"),
    Accepted("data_parallel_external_lb", ON, "--data-parallel-rank serves one replica at an address of its own",
        "leave --data-parallel-rank out to serve all replicas at one address", True, "data_parallel_rank"),
    Accepted("data_parallel_backend", ("mp",), "replicas are processes",
        "start a `shoal serve --headless` on each host"),
    Accepted("trust_remote_code", EITHER, "code beside a checkpoint is never run; a model that needs it is refused",
        "leave it out"),
    Accepted("swap_space", ANY_NUMBER, "a request that gives up its blocks is computed again, nothing is swapped",
        "leave it out"),
    Accepted("cpu_offload_gb", ("0", "0.0"), "weights stay where they are computed with",
        "use more ranks (--tensor-parallel-size, --pipeline-parallel-size)"),
    Accepted("preemption_mode", ("recompute",), "a request that gives up its blocks is computed again", "leave it out"),
    Accepted("kv_cache_dtype", ("auto",), "keys and values have the type of the activations",
        "choose the type of all with --dtype"),
    Accepted("calculate_kv_scales", OFF, "keys and values are not scaled", "leave it out"),
    Accepted("quantization", (), "FP8 weights are read as config.json says",
        "leave it out: how weights are stored is read from config.json"),
    Accepted("tokenizer_mode", ("auto", "hf"), "the fast tokenizer is used where there is one", "leave it out"),
    Accepted("tokenizer", (), "the tokenizer is the model's", "put its files into the model's folder"),
    Accepted("skip_tokenizer_init", OFF, "the tokenizer is read where there is one",
        "requests may have prompt_token_ids and `detokenize` false all the same"),
    Accepted("config_format", ("auto", "hf"), "config.json is what says what a model is", "convert the checkpoint"),
    Accepted("task", ("auto", "generate"), _TEXT_ONLY, "serve a model that generates text"),
    Accepted("runner", ("auto", "generate"), _TEXT_ONLY, "serve a model that generates text"),
    Accepted("enable_lora", OFF, "models are run as they are", "merge the adapter into the weights"),
    Accepted("max_seq_len_to_capture", ANY_NUMBER, _EAGER, "leave it out"),
    Accepted("max_cudagraph_capture_size", ANY_NUMBER, _EAGER, "leave it out"),
    Accepted("compilation_config", ("0", '{"mode": 0}', '{"level": 0}', "{}"), _EAGER, "leave it out"),
    Accepted("disable_custom_all_reduce", ON, "sums over ranks are those of NCCL and gloo", "leave it out"),
    Accepted("disable_cascade_attn", ON, "each request's attention is computed by itself", "leave it out"),
    Accepted("disable_hybrid_kv_cache_manager", ON, "there is one block table a sequence", "leave it out"),
    Accepted("use_v2_block_manager", ON, "there is one way to manage blocks", "leave it out"),
    Accepted("num_scheduler_steps", ("1",), "each step is planned by itself", "leave it out"),
    Accepted("scheduler_delay_factor", ("0", "0.0"), "a request starts as soon as there is room", "leave it out"),
    Accepted("max_num_partial_prefills", ("1",), "a step takes prompts in turn", "leave it out"),
    Accepted("stream_interval", ("1",), "each token is sent when it is there; what a reader leaves unread is merged",
        "leave it out"),
    Accepted("guided_decoding_backend", ("auto", "guidance"), "llguidance checks what must obey a schema or a grammar",
        "leave it out: requests are the same for all"),
    Accepted("disable_log_stats", ON, "the log has no statistics; they are in /metrics", "read them from /metrics"),
    Accepted("disable_log_requests", ON, "the log has no requests", "--uvicorn-log-level info logs a line for each",
        True),
    Accepted("enable_log_requests", OFF, "the log has no requests", "--uvicorn-log-level info logs a line for each",
        True),
    Accepted("disable_uvicorn_access_log", ON, "without --uvicorn-log-level info there is none",
        "--uvicorn-log-level info logs a line for each request", True),
    Accepted("disable_frontend_multiprocessing", EITHER, "--api-server-count says how many processes answer",
        "leave it out", True),
    Accepted("enable_request_id_headers", ON, "each answer has an x-request-id", "leave it out", True),
    Accepted("response_role", ("assistant",), "an answer's role is assistant", "leave it out", True),
    Accepted("chat_template_content_format", ("auto",), "how a template reads contents is found out", "leave it out",
        True),
    Accepted("allow_credentials", OFF, "web pages send the key themselves, not as a cookie", "leave it out", True),
    Accepted("allowed_methods", ("*", '["*"]'), "web pages may use each method", "leave it out", True),
    Accepted("allowed_headers", ("*", '["*"]'), "web pages may send each header", "leave it out", True),
)  # fmt: skip


def options(*, server: bool) -> Iterator[Accepted]:
    """Those that a command or a class takes. `server`: also what only means something to what serves."""
    return (each for each in TABLE if server or not each.server)


def take(given: Mapping[str, Any], *, server: bool) -> tuple[dict[str, Any], list[str]]:
    """The options without these, and a note for the log on each that was there.

    Raises:
        ConfigError: one has a value that would change something.
    """
    known = {each.name: each for each in options(server=server)}
    notes = []
    for name, value in given.items():
        found = known.get(name)
        if found is None or value is None:
            continue
        found.check(value)
        if found.needs and given.get(found.needs) is None:
            raise ConfigError(f"{found.flag} needs --{found.needs.replace('_', '-')}: {found.note}")
        notes.append(f"{found.flag} changes nothing: {found.note}")
    return {name: value for name, value in given.items() if name not in known}, notes
