"""Texts for a data set of prompts, computed by engines in a Ray cluster. README.md beside this file has the commands.

Each actor of the Ray Data job has an `LLM`. Its ranks are on the host of the actor, with the resources of the actor;
with `--executor ray` they may be on several hosts.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.data

from shoal import LLM, SamplingParams
from shoal.params import Message

Batch = dict[str, "np.ndarray[Any, Any]"]

BATCHES_AT_A_TIME = 2  # in each engine, so that it stays busy while the last outputs of a batch are computed


class ShoalPredictor:
    """An engine that adds a column of texts to batches of rows. Several batches at a time share its steps."""

    def __init__(
        self, model: str | None, options: dict[str, Any], sampling: dict[str, Any], *, chat: bool = False
    ) -> None:
        """Start the engine.

        Args:
            model, options: as for `LLM`.
            sampling: the fields of the `SamplingParams` of all prompts.
            chat: a prompt is the message of a user, not the beginning of a text.
        """
        self._llm = LLM(model, **options)
        self._params = SamplingParams(**sampling)
        self._chat = chat

    def __call__(self, batch: Batch) -> Batch:
        """Return the batch with the columns `text` and `finish_reason`. It has the prompts in the column `prompt`."""
        prompts: list[str] = batch["prompt"].tolist()
        if self._chat:
            conversations: list[list[Message]] = [[{"role": "user", "content": prompt}] for prompt in prompts]
            outputs = self._llm.chat(conversations, self._params, use_tqdm=False)
        else:
            outputs = self._llm.generate(prompts, self._params, use_tqdm=False)
        firsts = [output.outputs[0] for output in outputs]
        added = {"text": [first.text for first in firsts], "finish_reason": [first.finish_reason for first in firsts]}
        return {**batch, **{name: np.array(values, dtype=object) for name, values in added.items()}}


def predict(
    rows: ray.data.Dataset,
    model: str | None,
    options: dict[str, Any],
    sampling: dict[str, Any],
    *,
    ranks: int = 1,
    executor: str = "mp",
    concurrency: int = 1,
    batch_size: int = 64,
    chat: bool = False,
) -> ray.data.Dataset:
    """Return a data set with texts, which is computed when it is read or written.

    Args:
        ranks: of each engine: the product of its parallel sizes.
        executor: mp: the ranks are on the host of the actor; ray: they have a placement group of their own.
        concurrency: how many engines there are.
        batch_size: rows that an engine gets at a time.
    """
    kind = "num_gpus" if ray.cluster_resources().get("GPU") else "num_cpus"
    own: dict[str, Any] = {"num_cpus": 1} if executor == "ray" else {kind: ranks}
    backend = "uni" if executor == "mp" and ranks == 1 else executor
    return rows.map_batches(
        ShoalPredictor,
        fn_constructor_args=(model, {**options, "distributed_executor_backend": backend}, sampling),
        fn_constructor_kwargs={"chat": chat},
        batch_size=batch_size,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            size=concurrency, max_concurrent_calls_per_actor=BATCHES_AT_A_TIME, enable_true_multi_threading=True
        ),
        **own,
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", type=Path, help="a file or folder of JSON lines or Parquet, with the column prompt")
    parser.add_argument("output", type=Path, help="a folder for the result, in the format of the input")
    parser.add_argument("--model", help="a folder or an id on the hub (default: the bundled model)")
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    parser.add_argument("--pipeline-parallel-size", type=int, default=1)
    parser.add_argument("--executor", choices=["mp", "ray"], default="mp", help="ray: ranks on several hosts")
    parser.add_argument("--concurrency", type=int, default=1, help="engines")
    parser.add_argument("--batch-size", type=int, default=64, help="rows that an engine gets at a time")
    parser.add_argument("--chat", action="store_true", help="a prompt is the message of a user")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ignore-eos", action="store_true", help="generate --max-tokens tokens always")
    parser.add_argument("--max-model-len", type=int, help="longest prompt plus output, in tokens")
    parser.add_argument("--kv-cache-memory-bytes", help="size of each rank's KV cache: 512MiB, 2GiB, ...")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    ray.init()
    is_parquet = "parquet" in arguments.input.suffix or (
        arguments.input.is_dir() and any(arguments.input.glob("*.parquet"))
    )
    where = str(arguments.input.resolve())
    rows = ray.data.read_parquet(where) if is_parquet else ray.data.read_json(where)
    options = {
        "tensor_parallel_size": arguments.tensor_parallel_size,
        "pipeline_parallel_size": arguments.pipeline_parallel_size,
        "max_model_len": arguments.max_model_len,
        "kv_cache_memory_bytes": arguments.kv_cache_memory_bytes,
    }
    result = predict(
        rows,
        arguments.model,
        {name: value for name, value in options.items() if value is not None},
        {name: getattr(arguments, name) for name in ("max_tokens", "temperature", "seed", "ignore_eos")},
        ranks=arguments.tensor_parallel_size * arguments.pipeline_parallel_size,
        executor=arguments.executor,
        concurrency=arguments.concurrency,
        batch_size=arguments.batch_size,
        chat=arguments.chat,
    )
    output = str(arguments.output.resolve())
    if is_parquet:
        result.write_parquet(output)
    else:
        result.write_json(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
