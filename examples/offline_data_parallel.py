"""Offline inference on several replicas that are started by hand, with one process per replica, on one or more hosts.

    python examples/offline_data_parallel.py --model MODEL --dp-size 2 --tp-size 2

On two hosts, with the same secret in SHOAL_CLUSTER_KEY on both, in any order:

    python examples/offline_data_parallel.py --model MODEL --dp-size 2 --tp-size 2 \
        --node-size 2 --node-rank 0 --master-addr 10.0.0.1 --master-port 29500
    python examples/offline_data_parallel.py --model MODEL --dp-size 2 --tp-size 2 \
        --node-size 2 --node-rank 1 --master-addr 10.0.0.1 --master-port 29500

Each process reads its number and the meeting point from SHOAL_DP_RANK, SHOAL_DP_SIZE, SHOAL_DP_MASTER_IP and
SHOAL_DP_MASTER_PORT, and computes its share of the prompts. The process with rank 0 prints all answers in order.
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from shoal import LLM, DataParallelRank, SamplingParams, ShoalError
from shoal.addresses import listen, parse_host
from shoal.errors import ConfigError
from shoal.transport.process import die_with_parent

PROMPTS = [f"{a} + {b} =" for a, b in [(37, 45), (8, 64), (3, 9), (51, 27), (12, 12), (70, 19), (5, 88)]]
LAUNCHER = "LAUNCHER_PID"  # variable in a rank's environment
RANK_ENDS_S = 30.0  # when one rank has failed, the others on the host have so long to end


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder, an id on the hub, or bundled (the default): the bundled model")
    parser.add_argument("--dp-size", type=int, default=2, help="replicas, over all hosts")
    parser.add_argument("--tp-size", type=int, default=1, help="ranks that share each layer of a replica")
    parser.add_argument("--pp-size", type=int, default=1, help="pipeline stages of a replica")
    parser.add_argument("--node-size", type=int, default=1, help="hosts")
    parser.add_argument("--node-rank", type=int, default=0, help="number of this host, from 0 on")
    parser.add_argument("--master-addr", default="127.0.0.1", help="address of the host with rank 0")
    parser.add_argument("--master-port", type=int, default=0, help="port on it; a free one on a single host")
    parser.add_argument("--prompts", type=Path, help="a file with one prompt per line")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--enable-expert-parallel", action="store_true", help="share the experts among all replicas")
    parser.add_argument("--max-model-len", type=int, help="longest prompt plus output, in tokens")
    parser.add_argument("--kv-cache-memory-bytes", help="size of each rank's KV cache: 512MiB, 2GiB, ...")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds to wait until all ranks are there")
    parser.add_argument(
        "--results-timeout", type=float, default=24 * 3600.0, help="seconds to wait for the slowest rank's results"
    )
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Check the arguments against each other.

    Raises:
        ConfigError: they contradict each other.
    """
    for name in ("dp_size", "tp_size", "pp_size", "node_size"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if not 0 <= arguments.node_rank < arguments.node_size:
        raise ConfigError(
            f"--node-rank {arguments.node_rank} is outside of --node-size {arguments.node_size}: hosts are numbered "
            f"from 0 to {arguments.node_size - 1}"
        )
    if arguments.dp_size < arguments.node_size:
        raise ConfigError(
            f"--dp-size {arguments.dp_size} leaves hosts of --node-size {arguments.node_size} without a replica: "
            "raise it, or use fewer hosts"
        )
    if arguments.node_size > 1 and not arguments.master_port:
        raise ConfigError("--node-size of 2 and more needs --master-port, the same on all hosts")


def ranks_of_host(arguments: argparse.Namespace) -> range:
    """Return the ranks of this host. The first hosts have one more if the division leaves a remainder."""
    each, more = divmod(arguments.dp_size, arguments.node_size)
    start = arguments.node_rank * each + min(arguments.node_rank, more)
    return range(start, start + each + (arguments.node_rank < more))


def start_ranks(arguments: argparse.Namespace) -> int:
    """Start a process for each rank of this host. Return 0 if all ended well, else the exit code of a failed one."""
    ranks = ranks_of_host(arguments)
    port = arguments.master_port or free_port(arguments.master_addr)
    children = []
    for local, rank in enumerate(ranks):
        place = {
            "SHOAL_DP_RANK": rank,
            "SHOAL_DP_SIZE": arguments.dp_size,
            "SHOAL_DP_RANK_LOCAL": local,
            "SHOAL_DP_SIZE_LOCAL": len(ranks),
            "SHOAL_DP_MASTER_IP": arguments.master_addr,
            "SHOAL_DP_MASTER_PORT": port,
            LAUNCHER: os.getpid(),
        }
        environment = {**os.environ, **{name: str(value) for name, value in place.items()}}
        children.append(subprocess.Popen([sys.executable, *sys.argv], env=environment))
    try:
        return wait_for(children)
    finally:
        for child in children:
            child.kill()
            child.wait()


def wait_for(children: "list[subprocess.Popen[bytes]]") -> int:
    while all(child.poll() is None for child in children):
        time.sleep(0.1)
    deadline = time.monotonic() + RANK_ENDS_S
    while any(child.poll() is None for child in children):
        failed = [child.returncode for child in children if child.returncode]
        if failed and time.monotonic() > deadline:
            return failed[0]
        if not failed:
            deadline = time.monotonic() + RANK_ENDS_S
        time.sleep(0.1)
    return next((child.returncode for child in children if child.returncode), 0)


def free_port(host: str) -> int:
    (found, *others) = listen(parse_host(host, "--master-addr"), 0)
    port = int(found.getsockname()[1])
    for each in (found, *others):
        each.close()
    return port


def run_rank(arguments: argparse.Namespace) -> None:
    prompts = arguments.prompts.read_text("utf-8").splitlines() if arguments.prompts else PROMPTS
    params = SamplingParams(temperature=arguments.temperature, max_tokens=arguments.max_tokens, seed=arguments.seed)
    options = {
        "tensor_parallel_size": arguments.tp_size,
        "pipeline_parallel_size": arguments.pp_size,
        "enable_expert_parallel": arguments.enable_expert_parallel,
        "max_model_len": arguments.max_model_len,
        "kv_cache_memory_bytes": arguments.kv_cache_memory_bytes,
    }
    timeouts = {"timeout": arguments.timeout, "results_timeout": arguments.results_timeout}
    with DataParallelRank.from_environment(**timeouts) as job, LLM(arguments.model, **options) as llm:
        share = job.share(prompts)
        outputs = llm.generate(list(share.values()), params, use_tqdm=False)
        answers = job.gather(
            {
                index: {"rank": job.rank, "prompt": prompt, "text": output.outputs[0].text}
                for (index, prompt), output in zip(share.items(), outputs, strict=True)
            }
        )
    for answer in answers or []:
        print(f"rank {answer['rank']}: {answer['prompt']!r} -> {answer['text']!r}")


def main() -> int:
    arguments = parse_arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        check(arguments)
        if "SHOAL_DP_RANK" not in os.environ:
            return start_ranks(arguments)
        if LAUNCHER in os.environ:
            die_with_parent(int(os.environ[LAUNCHER]))
        run_rank(arguments)
    except ShoalError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
