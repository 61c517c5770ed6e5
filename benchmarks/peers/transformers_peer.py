"""transformers' `generate` as a peer of `benchmarks/compare.py`: `python transformers_peer.py FOLDER TP`."""

import sys
from typing import Any

import requests_of_peers  # type: ignore[import-not-found]  # beside this file, which is a program
import torch
from transformers import AutoModelForCausalLM


def main(folder: str) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    def generate(prompts: list[list[int]], tokens: int) -> Any:
        ids = torch.tensor(prompts)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )

    with torch.inference_mode():
        requests_of_peers.serve(generate)


if __name__ == "__main__":
    main(sys.argv[1])
