"""The lines of an output file."""

from typing import Any

from shoal.jobs import openai_batch
from shoal.jobs.entries import JobEntry
from shoal.openai.answers import logprobs_by_id
from shoal.outputs import CompletionOutput, RequestOutput


def output_line(entry: JobEntry, digest: str, output: RequestOutput, model: str) -> dict[str, Any]:
    """Return the line of an output.

    It has the `index` of the prompt and the `digest` of prompt and parameters (see `entries.digest`). A request in
    OpenAI's batch format gets an answer in that format, with these two keys added.
    """
    if output.error is not None:
        return failed_line(entry, output.error)
    if entry.endpoint is not None:
        return {**openai_batch.answer_line(entry, output, model), "index": entry.index, "digest": digest}
    line: dict[str, Any] = {
        "index": entry.index,
        **entry.ids,
        "prompt": output.prompt,
        "prompt_token_ids": list(output.prompt_token_ids),
        "outputs": [_completion(each) for each in output.outputs],
    }
    if output.prompt_logprobs is not None:
        line["prompt_logprobs"] = logprobs_by_id(output.prompt_logprobs, [])
    return {**line, "digest": digest}


def failed_line(entry: JobEntry, why: str) -> dict[str, Any]:
    """Return the line of a prompt that failed."""
    if entry.is_batch_request:
        return {**openai_batch.failed_line(entry, why), "index": entry.index}
    echo = {"prompt": entry.text, "prompt_token_ids": entry.tokens}
    return {"index": entry.index, **entry.ids, **echo, "outputs": [], "error": why}


def _completion(output: CompletionOutput) -> dict[str, Any]:
    line: dict[str, Any] = {
        "text": output.text,
        "token_ids": list(output.token_ids),
        "finish_reason": output.finish_reason,
        "stop_reason": output.stop_reason,
    }
    if output.logprobs is not None:
        line["cumulative_logprob"] = output.cumulative_logprob
        line["logprobs"] = logprobs_by_id(output.logprobs, [])
    return line
