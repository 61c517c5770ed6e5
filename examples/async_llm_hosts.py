"""A Python service that feeds replicas on several hosts through `AsyncLLM`. This process computes nothing itself.

On each host with replicas, with the same secret in SHOAL_CLUSTER_KEY everywhere, in any order:

    shoal serve MODEL --headless -dp 4 --data-parallel-start-rank 0 --data-parallel-size-local 2 \
        --data-parallel-address 10.0.0.1
    shoal serve MODEL --headless -dp 4 --data-parallel-start-rank 2 --data-parallel-size-local 2 \
        --data-parallel-address 10.0.0.1

and here, on the host with that address:

    python examples/async_llm_hosts.py --model MODEL --dp-size 4 --address 10.0.0.1

If a replica ends or its host is cut off, the other replicas take over its requests. It may come back at any time.
"""

import argparse
import asyncio
import sys

from shoal import AsyncLLM, SamplingParams, ShoalError

PROMPTS = [f"{a} + {b} =" for a, b in [(37, 45), (8, 64), (3, 9), (51, 27), (12, 12), (70, 19), (5, 88)]]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, an id on the hub, or bundled (the default): the bundled model")
    parser.add_argument("--dp-size", type=int, default=2, help="replicas, over all hosts")
    parser.add_argument("--local", type=int, default=0, help="replicas that this process starts itself")
    parser.add_argument("--address", default="127.0.0.1", help="address of this host, as other hosts reach it")
    parser.add_argument("--port", type=int, help="port on this host at which replicas arrive")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--max-model-len", type=int, help="longest prompt plus output, in tokens")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait for the first replica")
    return parser.parse_args()


async def complete(llm: AsyncLLM, prompt: str, params: SamplingParams) -> str:
    """Return the complete text. Each output before the last has the text so far."""
    text = ""
    async for output in llm.generate(prompt, params):
        text = output.outputs[0].text
    return text


async def run(arguments: argparse.Namespace) -> None:
    options = {
        "data_parallel_size": arguments.dp_size,
        "data_parallel_size_local": arguments.local,
        "data_parallel_address": arguments.address,
        "data_parallel_rpc_port": arguments.port,
        "max_model_len": arguments.max_model_len,
    }
    async with AsyncLLM(arguments.model, **options) as llm:
        await llm.ready(arguments.timeout)
        params = SamplingParams(temperature=0.0, max_tokens=arguments.max_tokens)
        texts = await asyncio.gather(*(complete(llm, prompt, params) for prompt in PROMPTS))
        for prompt, text in zip(PROMPTS, texts, strict=True):
            print(f"{prompt!r} -> {text!r}")
        for replica in (await llm.status()).replicas:
            print(f"replica {replica.number} on {replica.host or 'no host yet'}: {replica.state}", file=sys.stderr)


def main() -> int:
    arguments = parse_arguments()
    try:
        asyncio.run(run(arguments))
    except TimeoutError:
        print(f"no replica was ready within {arguments.timeout:g} s", file=sys.stderr)
        return 1
    except ShoalError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
