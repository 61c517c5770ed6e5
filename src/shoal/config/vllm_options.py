"""Options of vLLM's that Shoal does not have: one table each for flags, config files, environment variables,
`LLM(...)` and docs/flags.md.

`TABLE` has those for which there is nothing to set here, so that scripts run unchanged: a value that says how Shoal
works anyway is accepted with a note in the log; any other value is refused with the nearest way to what it asks for.
`LACKING` has all others: they are unknown, and the error says what to do instead.
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
    """An option of vLLM's that is accepted although it changes nothing.

    `values` are those that are accepted, as texts.
    """

    name: str
    values: tuple[str, ...]
    note: str  # how Shoal works anyway
    instead: str  # what to do where another value was given
    server: bool = False  # it is only for `shoal serve` and AsyncLLM
    needs: str = ""  # another option, without which this one means nothing

    @property
    def flag(self) -> str:
        return _flag(self.name)

    @property
    def is_switch(self) -> bool:
        return set(self.values) <= set(EITHER)

    @property
    def metavar(self) -> str:
        return "NUMBER" if self.values == ANY_NUMBER else "|".join(self.values)

    def check(self, value: Any, name: str = "") -> None:
        """Accept a value that changes nothing; the error calls the option `name`, or by its flag.

        Raises:
            ConfigError: the value would change something.
        """
        if (self.values == ANY_NUMBER and _is_number(value)) or _text(value) in self.values:
            return
        name = name or self.flag
        if self.is_switch and _text(value) not in EITHER:
            raise ConfigError(f"{name} takes true or false, got {shown(value)}")
        taken = f" takes {' or '.join(self.values)} here" if not self.is_switch else " can't be obeyed"
        what = f"{name}{taken}, got {shown(value)}" if not self.is_switch else f"{self._negated}{taken}"
        raise ConfigError(f"{what}: {self.instead}")

    @property
    def _negated(self) -> str:
        return self.flag if self.values == OFF else f"--no-{self.flag[2:]}"


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)[:100]


def _is_number(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and math.isfinite(float(value)) and float(value) >= 0
    except (TypeError, ValueError, OverflowError):
        return False


_EAGER = "operations are launched one by one, without CUDA graphs or compilation"
_TEXT_ONLY = "Shoal runs models that generate text"
TABLE: tuple[Accepted, ...] = (
    Accepted("enable_chunked_prefill", ON, "long prompts are always computed in chunks that fit into a step",
        "a larger --max-num-batched-tokens makes the chunks as long as the prompts"),
    Accepted("async_scheduling", ON, "the next step is always planned before the current one has ended",
        "--max-in-flight 1 plans each step after the one before has ended"),
    Accepted("enable_fault_tolerance", ON, "a replica that fails is always restarted, and its requests go on",
        "--max-restarts 0 switches restarts off"),
    Accepted("data_parallel_external_lb", ON, "--data-parallel-rank serves one replica at an address of its own",
        "leave --data-parallel-rank out to serve all replicas at one address", True, "data_parallel_rank"),
    Accepted("trust_remote_code", EITHER, "code beside a checkpoint is never run; a model that needs it is refused",
        "leave it out"),
    Accepted("swap_space", ANY_NUMBER, "a preempted request is computed again, nothing is swapped", "leave it out"),
    Accepted("cpu_offload_gb", ("0", "0.0"), "weights stay on the device that computes with them",
        "use more ranks (--tensor-parallel-size, --pipeline-parallel-size)"),
    Accepted("preemption_mode", ("recompute",), "a preempted request is computed again", "leave it out"),
    Accepted("calculate_kv_scales", OFF, "scales of keys and values are never calibrated",
        "use --kv-cache-dtype int8, which gives each token and head a scale of its own"),
    Accepted("tokenizer_mode", ("auto", "hf"), "the fast tokenizer is used where there is one", "leave it out"),
    Accepted("skip_tokenizer_init", OFF, "the tokenizer is read where there is one",
        "leave it out: requests may have prompt_token_ids, and `detokenize` false, in any case"),
    Accepted("config_format", ("auto", "hf"), "a model is described by its config.json", "convert the checkpoint"),
    Accepted("task", ("auto", "generate"), _TEXT_ONLY, "serve a model that generates text"),
    Accepted("runner", ("auto", "generate"), _TEXT_ONLY, "serve a model that generates text"),
    Accepted("language_model_only", ON, "of a model that also sees images only the text part is run", "leave it out"),
    Accepted("enable_lora", OFF, "there are no LoRA adapters", "merge the adapter into the weights"),
    Accepted("enable_sleep_mode", ON, "sleeping (LLM.sleep, POST /sleep) is always possible", "leave it out"),
    Accepted("max_seq_len_to_capture", ANY_NUMBER, _EAGER, "leave it out"),
    Accepted("max_cudagraph_capture_size", ANY_NUMBER, _EAGER, "leave it out"),
    Accepted("compilation_config", ("0", '{"mode": 0}', '{"level": 0}', "{}"), _EAGER, "leave it out"),
    Accepted("disable_custom_all_reduce", ON, "there are no kernels of its own for sums over GPUs", "leave it out"),
    Accepted("disable_cascade_attn", ON, "the attention of each request is computed separately", "leave it out"),
    Accepted("disable_hybrid_kv_cache_manager", ON, "each sequence has one block table", "leave it out"),
    Accepted("use_v2_block_manager", ON, "there is only one block manager", "leave it out"),
    Accepted("num_scheduler_steps", ("1",), "each step is planned separately", "leave it out"),
    Accepted("scheduler_delay_factor", ("0", "0.0"), "a request starts as soon as there is room", "leave it out"),
    Accepted("max_num_partial_prefills", ("1",), "a step takes prompts one after the other", "leave it out"),
    Accepted("stream_interval", ("1",), "each token is sent as soon as it is known, or with the next ones if the "
        "client reads slowly", "leave it out"),
    Accepted("guided_decoding_backend", ("auto", "guidance"), "structured outputs are made with llguidance",
        "leave it out: requests look the same with every backend"),
    Accepted("disable_log_stats", ON, "statistics are not logged; they are in /metrics", "read them from /metrics"),
    Accepted("disable_log_requests", ON, "requests are not logged", "--uvicorn-log-level info logs a line for each",
        True),
    Accepted("enable_log_requests", OFF, "requests are not logged", "--uvicorn-log-level info logs a line for each",
        True),
    Accepted("disable_uvicorn_access_log", ON, "there is no access log without --uvicorn-log-level info",
        "--uvicorn-log-level info logs a line for each request", True),
    Accepted("disable_frontend_multiprocessing", EITHER, "--api-server-count is the number of processes that answer "
        "requests", "leave it out", True),
    Accepted("enable_request_id_headers", ON, "each answer has an x-request-id header", "leave it out", True),
    Accepted("enable_prompt_tokens_details", ON, "`usage` has prompt_tokens_details", "leave it out", True),
    Accepted("response_role", ("assistant",), "the role of an answer is assistant", "leave it out", True),
    Accepted("chat_template_content_format", ("auto",), "the form in which a template reads contents is detected",
        "leave it out", True),
    Accepted("allow_credentials", OFF, "web pages send the key in a header, not as a cookie", "leave it out", True),
    Accepted("allowed_methods", ("*", '["*"]'), "web pages may use every method", "leave it out", True),
    Accepted("allowed_headers", ("*", '["*"]'), "web pages may send every header", "leave it out", True),
)  # fmt: skip

NOT_YET = ""
_TOKENIZING = "use --api-server-count, the number of processes that tokenize"
_SPREAD = "use --expert-placement-strategy round_robin, which puts neighbouring experts on different ranks"
_KERNELS = "leave it out; kernels are chosen by device"
_LOADING = "leave it out; each rank reads its own slices of the files"
_NO_IMAGES = "leave it out; Shoal reads and writes text only"
_NO_POOLING = f"leave it out; {_TEXT_ONLY}"
_MERGE = "merge the adapter into the weights"
_MORE_RANKS = "use more ranks (--tensor-parallel-size, --pipeline-parallel-size)"
_DRAFT = 'use --speculative-config \'{"model": DRAFT, "num_speculative_tokens": 5}\''
_NGRAM = 'use --speculative-config \'{"method": "ngram", "prompt_lookup_max": 4}\''
_EXACT = "leave it out; a drafted token is kept if the model would have drawn it"
_ONE_PORT = "start a `shoal serve --data-parallel-rank N --port PORT` for each replica"
_PROXY = "put a proxy that does this in front of the server"
_METRICS = "leave it out; docs/metrics.md lists what is measured"
_NO_CAPTURE = f"leave it out; {_EAGER}"
# Name -> the nearest way, or NOT_YET.
LACKING: Mapping[str, str] = {
    # The model and its files
    "model": "name the model without a flag: `shoal serve MODEL`",
    "hf_config_path": "put config.json into the model's folder, or change fields of it with --hf-overrides",
    "rope_scaling": 'use --hf-overrides \'{"rope_scaling": {"rope_type": "linear", "factor": 2.0}}\'',
    "rope_theta": "use --hf-overrides '{\"rope_theta\": 500000.0}'",
    "code_revision": "leave it out; code beside a checkpoint is never run",
    "allow_deprecated_quantization": "leave it out; how weights are stored is read from config.json",
    "quantization_param_path": "leave it out; how weights are stored is read from config.json",
    "hf_token": "set the environment variable HF_TOKEN",
    "download_dir": "set HF_HOME, or run `shoal download MODEL --dir FOLDER` and serve that folder",
    "ignore_patterns": "leave it out; only files that are needed are fetched",
    "safetensors_load_strategy": _LOADING,
    "model_loader_extra_config": _LOADING,
    "use_tqdm_on_load": _LOADING,
    "pt_load_map_location": _LOADING,
    "max_parallel_loading_workers": _LOADING,
    "override_generation_config": "send the parameters with each request, or write them into the model's "
        "generation_config.json",
    "override_attention_dtype": "use --dtype, the type of weights, activations and KV cache",
    "disable_sliding_window": "leave it out; with a --max-model-len up to the window's length it makes no difference",
    "logprobs_mode": NOT_YET,
    "enable_prompt_embeds": NOT_YET,
    "enable_return_routed_experts": NOT_YET,
    "logits_processors": NOT_YET,
    "logits_processor_pattern": NOT_YET,
    "io_processor_plugin": NOT_YET,
    "convert": _NO_POOLING,
    "pooler_config": _NO_POOLING,
    "override_pooler_config": _NO_POOLING,
    "tokenizer_pool_size": _TOKENIZING,
    "tokenizer_pool_type": _TOKENIZING,
    "tokenizer_pool_extra_config": _TOKENIZING,
    # Images, audio and video
    **dict.fromkeys(
        ("allowed_local_media_path", "allowed_media_domains", "limit_mm_per_prompt", "enable_mm_embeds",
         "media_io_kwargs", "mm_processor_kwargs", "mm_processor_cache_gb", "mm_processor_cache_type",
         "mm_shm_cache_max_object_size_mb", "mm_encoder_only", "mm_encoder_tp_mode", "mm_encoder_attn_backend",
         "interleave_mm_strings", "skip_mm_profiling", "video_pruning_rate", "disable_mm_preprocessor_cache",
         "disable_chunked_mm_input", "ec_transfer_config"),
        _NO_IMAGES,
    ),
    # Adapters
    **dict.fromkeys(
        ("lora_modules", "max_loras", "max_lora_rank", "lora_dtype", "max_cpu_loras", "fully_sharded_loras",
         "default_mm_loras", "specialize_active_lora", "enable_tower_connector_lora", "lora_extra_vocab_size",
         "long_lora_scaling_factors", "enable_lora_bias", "qlora_adapter_name_or_path"),
        _MERGE,
    ),
    **dict.fromkeys(
        ("enable_prompt_adapter", "prompt_adapters", "max_prompt_adapters", "max_prompt_adapter_token"), NOT_YET
    ),
    # Kernels, compilation and graphs
    **dict.fromkeys(
        ("attention_backend", "attention_config", "kernel_config", "moe_backend", "enable_flashinfer_autotune",
         "override_neuron_config", "additional_config"),
        _KERNELS,
    ),
    **dict.fromkeys(
        ("optimization_level", "performance_mode", "cudagraph_capture_sizes", "cuda_graph_sizes",
         "max_context_len_to_capture", "cudagraph_metrics"),
        _NO_CAPTURE,
    ),
    # Ranks, replicas and hosts
    "worker_use_ray": "use --distributed-executor-backend ray",
    "engine_use_ray": "use --distributed-executor-backend ray",
    "ray_workers_use_nsight": "leave it out",
    "distributed_timeout_seconds": "use --start-timeout and --step-timeout",
    "cpu_distributed_timeout_seconds": "use --start-timeout and --step-timeout",
    "decode_context_parallel_size": NOT_YET,
    "prefill_context_parallel_size": NOT_YET,
    "dcp_comm_backend": NOT_YET,
    "dcp_kv_cache_interleave_size": NOT_YET,
    "cp_kv_cache_interleave_size": NOT_YET,
    "data_parallel_multi_port_external_lb": _ONE_PORT,
    "data_parallel_supervisor_port": _ONE_PORT,
    "dp_supervisor_probe_interval_s": _ONE_PORT,
    "dp_supervisor_probe_timeout_s": _ONE_PORT,
    "dp_supervisor_probe_failure_threshold": _ONE_PORT,
    "disable_nccl_for_dp_synchronization": "leave it out; replicas that share experts agree by messages on the CPU",
    "enable_dbo": NOT_YET,
    "ubatch_size": NOT_YET,
    "dbo_decode_token_threshold": NOT_YET,
    "dbo_prefill_token_threshold": NOT_YET,
    "enable_elastic_ep": "use `shoal scale`, for replicas that do not share experts",
    "enable_eplb": _SPREAD,
    "eplb_config": _SPREAD,
    "num_redundant_experts": NOT_YET,
    "eplb_window_size": NOT_YET,
    "eplb_step_interval": NOT_YET,
    "eplb_log_balancedness": NOT_YET,
    "enable_ep_weight_filter": "leave it out; a rank only reads the experts that it holds",
    "numa_bind": "use --cpu-cores, which binds ranks to cores",
    "numa_bind_nodes": "use --cpu-cores, which binds ranks to cores",
    "numa_bind_cpus": "use --cpu-cores, which binds ranks to cores",
    "worker_cls": NOT_YET,
    "worker_extension_cls": NOT_YET,
    # The KV cache, and weights that do not fit
    "num_gpu_blocks_override": "use --kv-cache-memory-bytes, the size of the KV cache of each rank",
    "prefix_caching_hash_algo": "leave it out; there is one algorithm",
    "kv_sharing_fast_prefill": NOT_YET,
    "kv_offloading_size": NOT_YET,
    "kv_offloading_backend": NOT_YET,
    "kv_transfer_config": NOT_YET,
    "kv_events_config": NOT_YET,
    "weight_transfer_config": NOT_YET,
    "mamba_cache_dtype": "leave it out; state-space models are not run",
    "mamba_ssm_cache_dtype": "leave it out; state-space models are not run",
    "mamba_block_size": "leave it out; state-space models are not run",
    "mamba_cache_mode": "leave it out; state-space models are not run",
    **dict.fromkeys(
        ("offload_backend", "offload_group_size", "offload_num_in_group", "offload_prefetch_step", "offload_params",
         "cpu_offload_params"),
        _MORE_RANKS,
    ),
    # Scheduling
    "max_long_partial_prefills": "use --max-num-batched-tokens, which limits the prompt tokens of a step",
    "long_prefill_token_threshold": "use --max-num-batched-tokens, which limits the prompt tokens of a step",
    "num_lookahead_slots": "leave it out; room for drafted tokens follows from --speculative-config",
    "multi_step_stream_outputs": "leave it out; each token is sent as soon as it is known",
    "disable_async_output_proc": "leave it out",
    "scheduler_cls": NOT_YET,
    # Speculative decoding
    **dict.fromkeys(
        ("speculative_model", "num_speculative_tokens", "spec_model", "spec_method", "spec_tokens",
         "speculative_model_quantization", "speculative_draft_tensor_parallel_size", "speculative_max_model_len",
         "speculative_disable_by_batch_size", "speculative_disable_mqa_scorer",
         "disable_logprobs_during_spec_decoding"),
        _DRAFT,
    ),
    **dict.fromkeys(("ngram_prompt_lookup_max", "ngram_prompt_lookup_min"), _NGRAM),
    **dict.fromkeys(
        ("spec_decoding_acceptance_method", "typical_acceptance_sampler_posterior_threshold",
         "typical_acceptance_sampler_posterior_alpha"),
        _EXACT,
    ),
    # Structured outputs, reasoning and tools
    "structured_outputs_config": "leave it out; structured outputs are made with llguidance",
    "enable_reasoning": NOT_YET,
    "reasoning_parser": NOT_YET,
    "reasoning_parser_plugin": NOT_YET,
    "tool_parser_plugin": NOT_YET,
    "tool_server": NOT_YET,
    "exclude_tools_when_tool_choice_none": "leave `tools` out of the request",
    # What is logged and measured
    "otlp_traces_endpoint": NOT_YET,
    "collect_detailed_traces": NOT_YET,
    "profiler_config": "use --trace FOLDER for the traces of /start_profile and LLM.start_profile",
    **dict.fromkeys(
        ("show_hidden_metrics_for_version", "kv_cache_metrics", "kv_cache_metrics_sample", "enable_mfu_metrics",
         "enable_layerwise_nvtx_tracing", "enable_logging_iteration_details", "aggregate_engine_logging",
         "enable_server_load_tracking", "enable_per_request_metrics"),
        _METRICS,
    ),
    "log_config_file": "use SHOAL_LOG_LEVEL and --uvicorn-log-level",
    "max_log_len": "leave it out; prompts are not logged",
    "enable_log_outputs": "leave it out; outputs are not logged",
    "enable_log_deltas": "leave it out; outputs are not logged",
    "log_error_stack": "leave it out; an internal error is always logged in full",
    "disable_access_log_for_endpoints": "leave it out; there is no access log without --uvicorn-log-level info",
    "fail_on_environ_validation": "leave it out; an unknown SHOAL_* variable is warned of",
    # The server
    "default_chat_template_kwargs": "send chat_template_kwargs with each request",
    "enable_force_include_usage": 'send "stream_options": {"include_usage": true} with each request',
    "enable_tokenizer_info_endpoint": NOT_YET,
    "fingerprint_mode": NOT_YET,
    "fingerprint_value": NOT_YET,
    "cohere_format": NOT_YET,
    "cohere_is_reasoning_model": NOT_YET,
    "tokens_only": "send prompts as token ids, and read token ids",
    "grpc": NOT_YET,
    "uds": "listen on --host 127.0.0.1",
    "ssl_ca_certs": _PROXY,
    "ssl_cert_reqs": _PROXY,
    "ssl_ciphers": _PROXY,
    "enable_ssl_refresh": _PROXY,
    "middleware": _PROXY,
    "h11_max_incomplete_event_size": "leave it out; the size of headers is limited; --max-request-bytes limits bodies",
    "h11_max_header_count": "leave it out; the size of headers is limited; --max-request-bytes limits bodies",
    "enable_offline_docs": NOT_YET,
    "enable_flash_late_interaction": _NO_POOLING,
}  # fmt: skip

# Flags of `shoal serve` that vLLM takes for offline runs too.
_SERVER_FLAGS = ("max_logprobs", "served_model_name", "shutdown_timeout")
_SHORT = {"-O": "optimization_level", "-ac": "attention_config", "-cc": "compilation_config",
          "-dcp": "decode_context_parallel_size",
          "-pcp": "prefill_context_parallel_size", "-dpe": "data_parallel_external_lb",
          "-dpm": "data_parallel_multi_port_external_lb",
          "-spec-draft-tp": "speculative_draft_tensor_parallel_size"}  # fmt: skip


def options(*, server: bool) -> Iterator[Accepted]:
    """The options that a command or a class accepts; with `server` also those for `shoal serve` and AsyncLLM."""
    return (each for each in TABLE if server or not each.server)


def take(given: Mapping[str, Any], *, server: bool) -> tuple[dict[str, Any], list[str]]:
    """Return the other options, and for each of these a note for the log.

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
            raise ConfigError(f"{found.flag} needs {_flag(found.needs)}: {found.note}")
        notes.append(f"{found.flag} changes nothing: {found.note}")
    return {name: value for name, value in given.items() if name not in known}, notes


def explain(name: str) -> str | None:
    """Return what to say of a name that is unknown here but known to vLLM; None if vLLM does not know it either.

    `name` is a flag, the key of a config file, the argument of a program, or a variable's name without its prefix.
    """
    plain = _SHORT.get(name) or name.lstrip("-").replace("-", "_").lower().split(".")[0]
    if plain.removeprefix("no_") in LACKING:
        plain = plain.removeprefix("no_")
        way = LACKING[plain]
        return f"Shoal does not have vLLM's {_flag(plain)}{f': {way}' if way else ' yet'}"
    if plain in _SERVER_FLAGS:
        return f"{_flag(plain)} is a flag of `shoal serve` only: leave it out here"
    found = next((each for each in TABLE if each.name == plain.removeprefix("no_")), None)
    if found is None:
        return None
    if found.server:
        return f"vLLM's {found.flag} is for `shoal serve` and AsyncLLM: leave it out here"
    return f"vLLM's {found.flag} changes nothing here: {found.note}"
