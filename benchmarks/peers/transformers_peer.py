"""transformers' `generate` as a peer of `benchmarks/compare.py`: `python transformers_peer.py FOLDER SETTINGS`."""

from typing import Any

import requests_of_peers  # type: ignore[import-not-found]  # beside this file, which is a program
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    folder, settings = requests_of_peers.arguments()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    sampling: dict[str, Any] = {"do_sample": False}
    if settings["temperature"] > 0:
        sampling = {"do_sample": True, "temperature": settings["temperature"], "top_k": 0}

    def generate(prompts: list[list[int]], tokens: int) -> Any:
        ids = torch.tensor(prompts)
        return model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            **sampling,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            pad_token_id=0,
        )

    with torch.inference_mode():
        requests_of_peers.serve(folder, generate)


if __name__ == "__main__":
    main()
