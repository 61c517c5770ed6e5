"""Shoal as a peer of `benchmarks/compare.py`: `python shoal_peer.py FOLDER SETTINGS`."""

from typing import Any

import requests_of_peers  # type: ignore[import-not-found]  # beside this file, which is a program

from shoal import LLM, SamplingParams


def main() -> None:
    folder, settings = requests_of_peers.arguments()
    tp = settings["tp"]
    llm = LLM(
        folder,
        tensor_parallel_size=tp,
        enable_expert_parallel=settings["experts"],
        quantization=settings["quantization"],
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["max_num_seqs"],
        kv_cache_memory_bytes=settings["kv_bytes"] // tp,
    )

    def generate(prompts: list[list[int]], tokens: int) -> Any:
        given: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        params = SamplingParams(max_tokens=tokens, temperature=settings["temperature"], ignore_eos=True)
        return llm.generate(given, params, use_tqdm=False)

    with llm:
        requests_of_peers.serve(folder, generate)


if __name__ == "__main__":
    main()
