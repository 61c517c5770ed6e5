"""Tests of pipeline stages: together they give the tokens of one stage, with all options of a request."""

import logging
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from conformance.test_greedy_tokens import FEW, MIXED, Checkpoint, assert_same, generate, make_prompts, run
from shoal import LLM, RequestOutput, SamplingParams
from shoal.errors import ConfigError
from shoal.models.checkpoint.checkpoint import open_checkpoint
from shoal.models.checkpoint.loader import CheckpointWeights
from shoal.models.implementation import params_of, rank_shards, read_model
from shoal.models.manifest import Param, weight_bytes
from shoal.params import StructuredOutputsParams
from shoal.wire.engine import EngineStats
from shoal.wire.plan import Layout
from shoal.wire.ranks import RankStats, StepPlan, StepResult
from shoal.worker import kv_cache
from shoal.worker.runner import Runner
from support import other_models
from support.fakes import this_rank

THREADS: dict[str, Any] = {"distributed_executor_backend": "threads", "kv_cache_memory_bytes": 2**21}


def open_llm(folder: Path | None, pp: int, tp: int = 1, **options: Any) -> LLM:
    name = None if folder is None else str(folder)
    return LLM(name, **{**THREADS, **options}, pipeline_parallel_size=pp, tensor_parallel_size=tp)


def staged(folder: Path, prompts: Sequence[Sequence[int]], pp: int, tp: int = 1, **options: Any) -> list[RequestOutput]:
    steps = options.pop("steps", 12)
    return generate(folder, prompts, steps, **THREADS, pipeline_parallel_size=pp, tensor_parallel_size=tp, **options)


def tokens_of(outputs: Sequence[RequestOutput]) -> list[list[tuple[int, ...]]]:
    return [[sample.token_ids for sample in output.outputs] for output in outputs]


@pytest.mark.parametrize("name", sorted(other_models.ALL))
def test_modules_of_transformers(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    folder = other_models.save(name, tmp_path_factory.mktemp(name))
    assert_same(folder, FEW, staged(folder, FEW, 3, steps=8))


@pytest.mark.parametrize("name", ["Granite", "Starcoder2"])
def test_modules_of_transformers_cut_both_ways(tmp_path: Path, name: str) -> None:
    folder = other_models.save(name, tmp_path)
    assert_same(folder, FEW, staged(folder, FEW, 2, 2, steps=8))


def test_a_module_that_can_not_be_cut_is_refused_by_name(checkpoint: Checkpoint) -> None:
    with pytest.raises(
        ConfigError,
        match=r"--pipeline-parallel-size 2: OPTForCausalLM can run through transformers as one stage only, because its "
        r"residual stream does not have the width .*; use --tensor-parallel-size or --data-parallel-size$",
    ):
        open_llm(checkpoint("opt_350m"), 2, model_impl="transformers")


@pytest.mark.parametrize("partition", [(1, 2), (2, 1), (1, 1, 1)])
def test_any_partition(checkpoint: Checkpoint, partition: tuple[int, ...]) -> None:
    folder = checkpoint("llama")
    assert_same(folder, FEW, staged(folder, FEW, len(partition), pipeline_layer_partition=partition))


@pytest.mark.slow
def test_processes(checkpoint: Checkpoint) -> None:
    folder = checkpoint("llama3")
    outputs = generate(
        folder, MIXED, 12, pipeline_parallel_size=2, tensor_parallel_size=2, distributed_executor_backend="mp"
    )
    assert_same(folder, MIXED, outputs)


# --- steps in flight ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("pp", "depth"), [(3, 1), (3, 2), (2, 5)])
def test_any_number_of_plans_in_flight_and_prompts_in_chunks(checkpoint: Checkpoint, pp: int, depth: int) -> None:
    folder = checkpoint("llama")
    assert_same(folder, MIXED, staged(folder, MIXED, pp, max_num_batched_tokens=7, max_in_flight=depth))


@pytest.mark.parametrize("depth", [1, 3])
def test_preempted_requests_come_back(checkpoint: Checkpoint, depth: int) -> None:
    """A token that was drawn for a sequence that has ended meanwhile is dropped."""
    folder, prompts = checkpoint("llama"), make_prompts([20, 30, 25, 33, 8, 14], seed=3)
    block = 2 * 2 * 16 * 4 * 8 * 4  # bytes on the stage with two layers
    with open_llm(folder, 2, kv_cache_memory_bytes=6 * block, max_in_flight=depth, max_model_len=96) as llm:
        outputs = run(llm, prompts, steps=48)
        assert llm.stats().preemptions > 0
    assert_same(folder, prompts, outputs)


def test_one_after_the_other(checkpoint: Checkpoint) -> None:
    """The first stage reads the tokens of ended requests, too, in the order of the steps."""
    folder = checkpoint("llama")
    with open_llm(folder, 2) as llm:
        for prompt in MIXED:
            for steps in (1, 3):
                assert_same(folder, [prompt], run(llm, [prompt], steps))
        stats = llm.stats()
    sent, read = (
        next(each.count for each in rank.traffic if (each.axis, each.operation) == ("token_return", operation))
        for rank, operation in ((stats.ranks[1], "send"), (stats.ranks[0], "recv"))
    )
    assert 0 <= sent - read <= 3  # at most the steps in flight


def test_requests_that_end_while_their_steps_are_in_flight(checkpoint: Checkpoint) -> None:
    """They end by a stop token that the engine sees late, or because they are aborted."""
    folder = checkpoint("llama")
    with open_llm(folder, 2) as llm:
        whole = run(llm, MIXED, 12)
        prompts: Any = [{"prompt_token_ids": prompt} for prompt in MIXED]
        ends = [output.outputs[0].token_ids[5] for output in whole]
        params = [SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop_token_ids=[end]) for end in ends]
        for output, full, end in zip(llm.generate(prompts, params, use_tqdm=False), whole, ends, strict=True):
            tokens = full.outputs[0].token_ids
            assert output.outputs[0].token_ids == tokens[: tokens.index(end) + 1]
        long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
        short = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
        given_up = llm.run([llm.prepare(i, prompt, short if i == 0 else long) for i, prompt in enumerate(prompts)])
        assert next(given_up)[0] == 0
        given_up.close()  # type: ignore[attr-defined]
        stats = llm.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert stats.free_blocks == stats.num_blocks
        assert_same(folder, MIXED, run(llm, MIXED, 12))


# --- options of requests -----------------------------------------------------------------------------------------


def seeded(i: int) -> SamplingParams:
    kinds: list[dict[str, Any]] = [
        {"temperature": 1.0},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "n": 2},
        {"temperature": 1.0, "presence_penalty": 0.5, "repetition_penalty": 1.3, "logit_bias": {7: 2.0}},
        {"temperature": 0.0, "frequency_penalty": 1.0, "bad_words": []},
    ]
    return SamplingParams(seed=i, max_tokens=16, ignore_eos=True, **kinds[i % len(kinds)])


@pytest.mark.parametrize(
    "speculative", [None, {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 3}]
)
def test_draws_are_those_of_one_stage(checkpoint: Checkpoint, speculative: Any) -> None:
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in [*MIXED, [5, 6, 7, 8] * 5]]
    params = [seeded(i) for i in range(len(prompts))]
    found = []
    for pp, tp in [(1, 1), (3, 2)]:
        with open_llm(checkpoint("llama"), pp, tp, speculative_config=speculative) as llm:
            found.append(tokens_of(llm.generate(prompts, params, use_tqdm=False)))
    assert found[1] == found[0]


@pytest.mark.parametrize(("pp", "tp"), [(2, 2), (3, 1)])
def test_the_last_stage_has_the_draft_model(checkpoint: Checkpoint, pp: int, tp: int) -> None:
    folder = checkpoint("llama")
    with open_llm(folder, pp, tp) as llm:
        plain = [rank.weight_bytes for rank in llm.stats().ranks]
    with open_llm(folder, pp, tp, speculative_config={"model": str(folder), "num_speculative_tokens": 3}) as llm:
        outputs, stats = run(llm, MIXED), llm.stats()
    assert_same(folder, MIXED, outputs)
    assert stats.accepted_tokens > 0.9 * stats.draft_tokens > 0  # it is the same model
    with_draft = [rank.weight_bytes for rank in stats.ranks]
    assert with_draft[:-tp] == plain[:-tp]
    assert sum(with_draft[-tp:]) - sum(plain[-tp:]) == sum(plain)


def test_log_probabilities_of_prompts(checkpoint: Checkpoint) -> None:
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True, prompt_logprobs=2)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in MIXED]
    found = []
    for pp in (1, 3):
        with open_llm(checkpoint("llama"), pp, max_num_batched_tokens=24) as llm:
            found.append([output.prompt_logprobs for output in llm.generate(prompts, params, use_tqdm=False)])
    for one, three in zip(*found, strict=True):
        assert one is not None
        assert three is not None
        assert len(one) == len(three)
        for a, b in zip(one[1:], three[1:], strict=True):
            assert a is not None
            assert b is not None
            assert {token: pytest.approx(entry.logprob, abs=1e-4) for token, entry in a.items()} == {
                token: entry.logprob for token, entry in b.items()
            }


@pytest.mark.slow
def test_structured_outputs() -> None:
    kind = StructuredOutputsParams(regex=r"[a-z]{3,8}@[a-z]{2,5}\.(com|org)")
    params = SamplingParams(temperature=1, n=3, seed=7, max_tokens=60, structured_outputs=kind)
    found = []
    for pp, tp in [(1, 1), (4, 1), (2, 2)]:
        with open_llm(None, pp, tp, kv_cache_memory_bytes="16MiB") as llm:
            found.append(tokens_of(llm.generate(["37 + 45 =", "Reverse: apple ->"], params, use_tqdm=False)))
    assert found[1:] == found[:1] * 2


# --- memory and communication of each stage ----------------------------------------------------------------------


def said(before: EngineStats, after: EngineStats) -> list[dict[tuple[str, str], int]]:
    """Return the number of operations of each rank, by axis and name."""

    def counts(stats: RankStats) -> dict[tuple[str, str], int]:
        return {(each.axis, each.operation): each.count for each in stats.traffic}

    return [
        {key: count - counts(old).get(key, 0) for key, count in counts(new).items()}
        for old, new in zip(before.ranks, after.ranks, strict=True)
    ]


def test_two_sums_a_layer_and_one_send_a_boundary(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: dict[int, int] = defaultdict(int)  # steps with work of one rank of each stage, by stage
    execute = Runner.execute

    def counting(self: Runner, plan: StepPlan) -> StepResult | None:
        stage, tp_rank = divmod(this_rank(), 2)
        if plan.work and tp_rank == 0:
            computed[stage] += 1
        return execute(self, plan)

    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts: Any = [{"prompt_token_ids": prompt} for prompt in FEW]
    with open_llm(checkpoint("gemma3"), 3, 2, pipeline_layer_partition=(1, 3, 2)) as llm:
        monkeypatch.setattr(Runner, "execute", counting)
        before = llm.stats()
        llm.generate(prompts, params, use_tqdm=False)
        after = llm.stats()
    steps = computed[0]
    assert steps >= 12
    assert dict(computed) == dict.fromkeys(range(3), steps)
    for rank, counts in enumerate(said(before, after)):
        stage, layers = rank // 2, (1, 3, 2)[rank // 2]
        assert counts["tp", "all_reduce"] == steps * (2 * layers + (stage == 0))
        assert counts.get(("pp", "send"), 0) == (steps if stage < 2 else 0)
        assert counts.get(("pp", "recv"), 0) == (steps if stage > 0 else 0)
        assert (
            set(counts) - {("tp", "all_reduce"), ("pp", "send"), ("pp", "recv")}
            == {
                0: {("token_return", "recv")},
                1: set(),
                2: {("token_return", "send"), ("tp", "all_gather")},  # drawn tokens
            }[stage]
        )
    sent = [{each.operation: each.sent_bytes for each in rank.traffic if each.axis == "pp"} for rank in after.ranks]
    assert sent[0]["send"] == sent[2]["send"] > 0
    assert [rank.stage for rank in after.ranks] == [0, 0, 1, 1, 2, 2]
    assert all(new.busy_us > old.busy_us > 0 for old, new in zip(before.ranks, after.ranks, strict=True))


def embedding_of(params: Sequence[Param]) -> str:
    return next(param.pieces[0].source for param in params if param.name == "embedding")


@pytest.mark.parametrize("name", ["llama", "llama3", "opt_350m", "gpt2"])
def test_a_stage_reads_and_holds_its_own_tensors(
    checkpoint: Checkpoint, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: dict[int, set[str]] = defaultdict(set)
    plain = CheckpointWeights.tensor

    def noting(self: CheckpointWeights, name: str) -> torch.Tensor:
        read[self._shard.stage.number].add(name)
        return plain(self, name)

    monkeypatch.setattr(CheckpointWeights, "tensor", noting)
    folder = checkpoint(name)
    with open_llm(folder, 3) as llm:
        held = [rank.weight_bytes for rank in llm.stats().ranks]
    spec, shapes = read_model(folder, "auto"), open_checkpoint(folder).shapes
    params = params_of(spec, shapes)
    shards = rank_shards(spec, Layout(stages=(1, 1, 1)))
    for shard in shards:
        number = shard.stage.number
        own = [param for param in params if param.at == {0: "first", 1: None, 2: "last"}[number] or param.at == number]
        assert read[number] == {param.name for param in own}
        assert held[number] == weight_bytes(spec, params, shard, 4, embedding_kept=True)
    table = {param.name for param in params for piece in param.pieces if piece.source == embedding_of(params)}
    assert {number for number, names in read.items() if names & table} == ({0, 2} if spec.tie_embeddings else {0})
    whole = weight_bytes(spec, params, rank_shards(spec, Layout())[0], 4, embedding_kept=True)
    assert sum(held) == whole


def test_the_cache_is_that_of_the_stages_layers(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """This holds for allocated memory; resident memory depends on the kernel's use of large pages."""
    sizes: list[int] = []

    def noting(*arguments: Any) -> kv_cache.KVMemory:
        found = allocate(*arguments)
        sizes.append(found.pool.nbytes)
        return found

    allocate = kv_cache.allocate
    monkeypatch.setattr(kv_cache, "allocate", noting)
    with open_llm(checkpoint("gemma3"), 3, pipeline_layer_partition=(1, 3, 2)) as llm:
        run(llm, MIXED)
        assert all(rank.kv_bytes > 0 for rank in llm.stats().ranks)
    one, two, three = sorted(sizes)
    assert (two, three) == (2 * one, 3 * one)


def test_the_log_shows_what_each_rank_holds(checkpoint: Checkpoint, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, "shoal")
    with open_llm(checkpoint("llama"), 2, 2, pipeline_layer_partition=(1, 2)):
        pass
    lines = [record.getMessage() for record in caplog.records if record.getMessage().startswith("rank ")]
    wanted = ["stage 0 of 2, tp 0 of 2, layers 0-0,", "stage 0 of 2, tp 1 of 2, layers 0-0,"]
    wanted += ["stage 1 of 2, tp 0 of 2, layers 1-2,", "stage 1 of 2, tp 1 of 2, layers 1-2,"]
    for rank, text in enumerate(wanted):
        (line,) = (line for line in lines if line.startswith(f"rank {rank}: {text}"))
        assert "4 query and 2 KV heads" in line
        assert any(each.startswith(f"rank {rank}: ") and "% of the cost" in each for each in lines)
