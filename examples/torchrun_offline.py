"""Offline inference in processes that torchrun starts, one for each rank, on one host or on several.

On one host:

    torchrun --nproc-per-node 2 examples/torchrun_offline.py --tensor-parallel-size 2

On two hosts, with the same command on each but for --node-rank:

    torchrun --nnodes 2 --nproc-per-node 2 --node-rank 0 --master-addr 10.0.0.1 --master-port 29400 \
        examples/torchrun_offline.py --tensor-parallel-size 2 --pipeline-parallel-size 2

The process with rank 0 has the engine. All processes make the same calls in the same order, and all get the same
outputs.
"""

import argparse
import sys

import torch.distributed

from shoal import LLM, SamplingParams, ShoalError

PROMPTS = ["37 + 45 =", "Count from 3 to 9:", "Reverse: apple ->"]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, an id on the hub, or bundled (the default): the bundled model")
    parser.add_argument("--tensor-parallel-size", type=int, default=1, help="ranks that share each layer")
    parser.add_argument("--pipeline-parallel-size", type=int, default=1, help="pipeline stages")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, help="longest prompt plus output, in tokens")
    parser.add_argument("--kv-cache-memory-bytes", help="size of each rank's KV cache: 512MiB, 2GiB, ...")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    params = SamplingParams(temperature=0, max_tokens=arguments.max_tokens)
    try:
        with LLM(
            arguments.model,
            tensor_parallel_size=arguments.tensor_parallel_size,
            pipeline_parallel_size=arguments.pipeline_parallel_size,
            distributed_executor_backend="external_launcher",
            max_model_len=arguments.max_model_len,
            kv_cache_memory_bytes=arguments.kv_cache_memory_bytes,
        ) as llm:
            outputs = llm.generate(PROMPTS, params, use_tqdm=False)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    if torch.distributed.get_rank() == 0:  # the others have the same outputs
        for output in outputs:
            print(f"{output.prompt!r} -> {output.outputs[0].text!r}")
    torch.distributed.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
