"""Planning of `--kv-cache-dtype`: the type in which ranks keep keys and values."""

from shoal.config.engine_options import EngineOptions
from shoal.models.kv_format import KV_FORMATS
from shoal.models.spec import ModelSpec

# Other names of types, which vLLM has -> ours.
_SAME = {"fp8": "fp8_e4m3", "int8_per_token_head": "int8"}


def plan_kv_dtype(options: EngineOptions, spec: ModelSpec, dtype: str, reasons: list[str]) -> str:
    """Return the type of the KV cache, a name of `KV_FORMATS`, for activations in `dtype`.

    If the user has chosen one, a line for the log says how many bytes a token takes.
    """
    wanted = options.cache.kv_cache_dtype
    if wanted == "auto":
        return dtype
    found = _SAME.get(wanted, wanted)
    own, plain = (KV_FORMATS[each].row_bytes(spec.head_dim) for each in (found, dtype))
    row = "key or value" if spec.latent is None else "latent"
    reasons.append(
        f"KV cache in {found}, as --kv-cache-dtype asks: {own} bytes for a {row} of {spec.head_dim} numbers; "
        f"in {dtype} it would be {plain}"
    )
    return found
