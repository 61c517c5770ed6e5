"""Shoal serves large language models across processes, devices and machines."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shoal.errors import EngineError as EngineError
    from shoal.errors import RequestError as RequestError
    from shoal.errors import ShoalError as ShoalError
    from shoal.errors import UserError as UserError
    from shoal.frontend.async_llm import AsyncLLM as AsyncLLM
    from shoal.frontend.data_parallel import DataParallelRank as DataParallelRank
    from shoal.frontend.llm import LLM as LLM
    from shoal.types import BeamSearchOutput as BeamSearchOutput
    from shoal.types import BeamSearchParams as BeamSearchParams
    from shoal.types import CompletionOutput as CompletionOutput
    from shoal.types import Logprob as Logprob
    from shoal.types import RequestOutput as RequestOutput
    from shoal.types import SamplingParams as SamplingParams
    from shoal.types import StructuredOutputsParams as StructuredOutputsParams

__version__ = "0.1.0"

_EXPORTS = {
    "LLM": "shoal.frontend.llm:LLM",
    "AsyncLLM": "shoal.frontend.async_llm:AsyncLLM",
    "DataParallelRank": "shoal.frontend.data_parallel:DataParallelRank",
    "SamplingParams": "shoal.types:SamplingParams",
    "RequestOutput": "shoal.types:RequestOutput",
    "CompletionOutput": "shoal.types:CompletionOutput",
    "Logprob": "shoal.types:Logprob",
    "StructuredOutputsParams": "shoal.types:StructuredOutputsParams",
    "BeamSearchParams": "shoal.types:BeamSearchParams",
    "BeamSearchOutput": "shoal.types:BeamSearchOutput",
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
