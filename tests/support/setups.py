"""What a rank is told, for tests of one rank."""

from typing import Any

from shoal.wire.base import WIRE_VERSION
from shoal.wire.ranks import RankSetup


def rank_setup(**changes: Any) -> RankSetup:
    """One rank on a CPU, small in every respect."""
    plain: dict[str, Any] = {
        "wire_version": WIRE_VERSION,
        "rank": 0,
        "world_size": 1,
        "incarnation": 1,
        "model_path": "",
        "model_impl": "shoal",
        "tp": 1,
        "tp_split": (),
        "stages": (1,),
        "load_format": "auto",
        "dtype": "float32",
        "device": "cpu",
        "device_index": 0,
        "seed": 0,
        "block_size": 16,
        "max_model_len": 16,
        "max_num_seqs": 1,
        "max_num_batched_tokens": 16,
        "cores": (),
        "threads": 1,
        "kv_budget": None,
        "memory_utilization": 0.9,
        "comm_timeout_s": 5.0,
    }
    return RankSetup(**{**plain, **changes})
