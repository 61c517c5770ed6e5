"""Shoal runs and serves large language models across processes, devices and hosts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.errors import EngineError as EngineError
    from shoal.errors import RequestError as RequestError
    from shoal.errors import ShoalError as ShoalError
    from shoal.errors import UserError as UserError
    from shoal.llm.async_llm import AsyncLLM as AsyncLLM
    from shoal.llm.data_parallel import DataParallelRank as DataParallelRank
    from shoal.llm.llm import LLM as LLM
    from shoal.outputs import BeamSearchOutput as BeamSearchOutput
    from shoal.outputs import CompletionOutput as CompletionOutput
    from shoal.outputs import Logprob as Logprob
    from shoal.outputs import RequestOutput as RequestOutput
    from shoal.params import BeamSearchParams as BeamSearchParams
    from shoal.params import SamplingParams as SamplingParams
    from shoal.params import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "shoal.llm.llm:LLM",
    "AsyncLLM": "shoal.llm.async_llm:AsyncLLM",
    "DataParallelRank": "shoal.llm.data_parallel:DataParallelRank",
    "SamplingParams": "shoal.params:SamplingParams",
    "RequestOutput": "shoal.outputs:RequestOutput",
    "CompletionOutput": "shoal.outputs:CompletionOutput",
    "Logprob": "shoal.outputs:Logprob",
    "StructuredOutputsParams": "shoal.params:StructuredOutputsParams",
    "BeamSearchParams": "shoal.params:BeamSearchParams",
    "BeamSearchOutput": "shoal.outputs:BeamSearchOutput",
    "ShoalError": "shoal.errors:ShoalError",
    "UserError": "shoal.errors:UserError",
    "RequestError": "shoal.errors:RequestError",
    "EngineError": "shoal.errors:EngineError",
}

__all__ = ["__version__", *_EXPORTS]  # noqa: PLE0604 - names of the mapping, pinned by tests/test_llm.py


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'shoal' has no attribute {name!r}")
    from shoal.lazy import load

    return load(_EXPORTS[name])
