"""Shoal as a peer of `benchmarks/compare.py`: `python shoal_peer.py FOLDER TP`."""

import sys
from typing import Any

import requests_of_peers  # type: ignore[import-not-found]  # beside this file, which is a program

from shoal import LLM, SamplingParams


def main(folder: str, tp: int) -> None:
    llm = LLM(
        folder,
        tensor_parallel_size=tp,
        max_model_len=requests_of_peers.MAX_LEN,
        max_num_seqs=requests_of_peers.MAX_BATCH,
        enable_prefix_caching=False,
        kv_cache_memory_bytes=requests_of_peers.KV_BYTES // tp,
    )

    def generate(prompts: list[list[int]], tokens: int) -> Any:
        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        return llm.generate(given, SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True), use_tqdm=False)

    with llm:
        requests_of_peers.serve(generate)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
