"""Count the bytes that carry tokens to their experts and back, for each backend and number of ranks.

`python benchmarks/all2all.py` prints JSON. Ranks are threads, so only bytes are measured; `shoal bench comm` measures
the time, between processes.
"""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from shoal.comm.base import Communicator
from shoal.comm.threads import ThreadComm, ThreadGroups
from shoal.parallel.all2all.backends import BACKENDS, make_dispatch
from shoal.parallel.all2all.choice import ExpertExchange, bytes_per_token, choose_backend
from shoal.parallel.expert_placement import place_experts
from shoal.parallel.mesh import make_mesh
from shoal.parallel.topology import Topology

_RANKS = (2, 4, 8)
_TOKENS = 256  # on each rank
_TIMEOUT_S = 120.0
_ITEM_BYTES = 2
# name: experts of a layer, experts of a token, width
_MODELS = {"mixtral-8x7b": (8, 2, 4096), "qwen3-30b-a3b": (128, 8, 2048), "deepseek-v2-lite": (64, 6, 2048)}


def _sent_bytes(backend: str, ranks: int, experts: int, top_k: int, hidden: int) -> int:
    """Return the bytes that all ranks together send for one layer's dispatch and combine."""
    groups, placement = ThreadGroups(_TIMEOUT_S), place_experts(experts, ranks, "linear")

    def rank(number: int) -> int:
        def connect(axis: str, group: Sequence[int]) -> Communicator:
            return ThreadComm(groups.group(axis, len(group)), number)

        mesh = make_mesh(Topology.of(dp=ranks), number, connect, expert_parallel=True)
        dispatch = make_dispatch(mesh, placement, backend, torch.device("cpu"))
        generator = torch.Generator().manual_seed(number)
        x = torch.randn(_TOKENS, hidden, generator=generator).bfloat16()
        chosen = torch.rand(_TOKENS, experts, generator=generator).topk(top_k).indices
        dispatch.begin_step(_TOKENS)
        totals = mesh.ep.comm.progress.read_totals()
        before = sum(total.sent_bytes for total in totals.values())
        routed = dispatch.dispatch(x, chosen, torch.ones(chosen.shape))
        dispatch.combine(routed.x, None)
        return sum(total.sent_bytes for total in totals.values()) - before

    with ThreadPoolExecutor(ranks) as pool:
        return sum(pool.map(rank, range(ranks)))


def _compare(model: str, ranks: int) -> dict[str, Any]:
    experts, top_k, hidden = _MODELS[model]
    exchange = ExpertExchange(tuple(map(len, place_experts(experts, ranks, "linear"))), top_k, hidden, _ITEM_BYTES)
    sent = {backend: _sent_bytes(backend, ranks, experts, top_k, hidden) / (ranks * _TOKENS) for backend in BACKENDS}
    expected = bytes_per_token(exchange)
    return {
        "model": model,
        "ranks": ranks,
        "experts": experts,
        "top_k": top_k,
        "hidden": hidden,
        "bytes_per_token": {backend: round(count) for backend, count in sent.items()},
        "expected_bytes_per_token": {backend: round(expected[backend]) for backend in BACKENDS},
        "all_to_all_share": round(sent["all_to_all"] / sent["allgather_reducescatter"], 3),
        "remote_ranks_of_a_token": round(exchange.remote_ranks, 2),
        "auto": choose_backend(exchange)[0],
    }


def main() -> None:
    torch.set_num_threads(1)
    results = [_compare(model, ranks) for model in _MODELS for ranks in _RANKS]
    print(json.dumps({"benchmark": "all2all", "dtype": "bfloat16", "tokens": _TOKENS, "results": results}, indent=2))


if __name__ == "__main__":
    main()
