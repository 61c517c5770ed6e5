"""From the body of a request to a job: sampling parameters, limits on one request, and checks of its grammars."""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeVar

from shoal.errors import RequestError
from shoal.openai import parameters
from shoal.openai.tools.tool_plan import ToolPlan
from shoal.params import SAMPLING_TABLE, SamplingParams
from shoal.sampling_table import Endpoint
from shoal.server.api.request_schemas import MAX_OUTPUTS, GenerationFields, SamplingFields
from shoal.server.api.service import Service
from shoal.server.http.errors import named_by_client
from shoal.server.http.work_threads import apart
from shoal.structured.schema.prepare import summarize_keywords
from shoal.text.prompts import Job

T = TypeVar("T")

# Fields that take long to read, however short they are.
_SLOW = {"bad_words", "structured_outputs", "response_format", "tools", "text", "chat_template", *parameters.GUIDED}
# Fields that every endpoint reads itself.
_READ_BY_ALL = (
    "stream", "stream_options", "priority", "data_parallel_rank", "request_id", "cache_salt", "return_token_ids",
    "return_tokens_as_token_ids",
)  # fmt: skip
_IGNORED_KEYWORDS = "X-Shoal-Schema-Ignored"
_MAX_IGNORED = 1000  # characters of that header
_MAX_TEXTS = 1024  # texts that are searched for in each output
_MAX_CHARACTERS = 1 << 16  # of all these texts together
# Limits on all outputs of a request together, as each is a request of its own for the engine.
_MAX_ALLOWED = 1 << 22  # entries of allowed_token_ids
_MAX_CHANGES = 1 << 20  # entries or characters of what changes single logits, or is compared with each token
_MAX_TOKENS = 1 << 25  # tokens of the prompts


async def read_apart(work: Callable[[], T], body: SamplingFields) -> T:
    """Return what `work` reads from a body. Work that takes long is done on another thread."""
    return await apart(work, body.size, quick=body.model_fields_set.isdisjoint(_SLOW))


def sampling_params(
    service: Service,
    body: Mapping[str, Any],
    names: Mapping[str, str],
    *,
    chat: bool,
    read: Collection[str] = (),
    plan: ToolPlan | None = None,
) -> SamplingParams:
    """Return the sampling parameters of a body, with the defaults of the model and of the endpoint.

    Args:
        names: our names of parameters -> the client's names, where they differ.
        read: fields that the endpoint reads itself.
        plan: what the body says about tools.

    Raises:
        RequestError: a parameter can't be obeyed, or is out of its range.
    """
    given = parameters.read_sampling(body, chat=chat, read=(*_READ_BY_ALL, *read))
    if plan is not None and plan.schema is not None:
        if "structured_outputs" in given:
            why = "`tool_choice` and a structured output don't go together: leave one out"
            raise RequestError(why, "tool_choice")
        given["structured_outputs"] = {"json": plan.schema, "strict": plan.strict}
    if plan is not None and plan.special_tokens:
        given["skip_special_tokens"] = False
    with named_by_client(names):
        _check_texts(given)
        base = service.llm.default_sampling_params(parameters.defaults(chat=chat))
        params = SamplingParams.from_dict(given, base)
        _check_logprobs(params, service.settings.max_logprobs)
    return params


def _check_texts(given: Mapping[str, Any]) -> None:
    for name in ("stop", "bad_words"):
        texts = given.get(name)
        texts = texts if isinstance(texts, list) else [texts]
        size = sum(len(text) for text in texts if isinstance(text, str))
        if len(texts) > _MAX_TEXTS or size > _MAX_CHARACTERS:
            raise RequestError.about(
                name,
                f"may have {_MAX_TEXTS} texts with {_MAX_CHARACTERS} characters in all, got {len(texts)} with {size}",
            )


def check_outputs(prompts: int, params: SamplingParams) -> None:
    """Check the number of outputs of a request, and the size of what each of them brings along.

    Raises:
        RequestError: it is more than one request may have.
    """
    outputs = prompts * params.n
    if outputs > MAX_OUTPUTS:
        why = f"a request may have {MAX_OUTPUTS} outputs, got {prompts} prompts with n {params.n}: send several"
        raise RequestError(why, "n" if prompts == 1 else "prompt")
    listed = {
        "allowed_token_ids": (len(params.allowed_token_ids or ()), _MAX_ALLOWED),
        "stop_token_ids": (len(params.stop_token_ids or ()), _MAX_CHANGES),
        "logit_bias": (len(params.logit_bias or ()), _MAX_CHANGES),
        "bad_words": (sum(map(len, params.bad_words or ())), _MAX_CHANGES),
    }
    for name, (size, most) in listed.items():
        if size * outputs > most:
            unit = "characters" if name == "bad_words" else "entries"
            raise RequestError.about(
                name,
                f"may have {most} {unit} over all outputs of a request, got {size} for each of {outputs} outputs: "
                "send several requests, or shorten it",
            )


def check_tokens(jobs: Sequence[Job], params: SamplingParams) -> None:
    """Check the size of all prompts of a request together.

    Raises:
        RequestError: over all outputs they have more tokens than one request may have.
    """
    tokens = sum(len(job.tokens) for job in jobs) * params.n
    if tokens > _MAX_TOKENS:
        why = f"a request may have prompts of {_MAX_TOKENS} tokens over all outputs, got {tokens}: send several"
        raise RequestError(why, "n" if params.n > 1 else "prompt")


def _check_logprobs(params: SamplingParams, most: int) -> None:
    """Check that the answer stays small: log-probabilities of a whole vocabulary for each token would be gigabytes.

    Raises:
        RequestError: more than `most` are wanted at each position.
    """
    for name in ("logprobs", "prompt_logprobs"):
        wanted = getattr(params, name)
        if wanted is not None and most >= 0 and not 0 <= wanted <= most:
            raise RequestError.about(name, f"may be {most} at most here, got {wanted}: see --max-logprobs")


def stream_usage(body: GenerationFields) -> tuple[bool, bool]:
    """Return whether a last chunk has the usage, and whether every other chunk has it too.

    Raises:
        RequestError: there are options of a stream, but no stream is asked for.
    """
    options = body.stream_options
    if options is None:
        return False, False
    if not body.stream:
        raise RequestError("stream_options needs stream to be true", "stream_options")
    wanted = bool(options.include_usage)
    return wanted, wanted and bool(options.continuous_usage_stats)


# Endpoint -> our name of what the prompt is made of -> the field of a request that has it.
_PROMPT_FIELDS: dict[Endpoint, dict[str, str]] = {
    "completions": {},
    "chat": {"prompt": "messages"},
    "responses": {"prompt": "input", "messages": "input"},
}


def client_names(body: Mapping[str, Any], endpoint: Endpoint) -> dict[str, str]:
    """Return the names that this client has for parameters, by our names, where they differ."""
    names = {name: theirs for name, row in SAMPLING_TABLE.items() if (theirs := row.http.get(endpoint, name)) != name}
    names |= _PROMPT_FIELDS[endpoint]
    if endpoint == "chat" and body.get("max_completion_tokens") is None:  # the client uses the older name
        del names["max_tokens"]
    if body.get("structured_outputs") is None:
        forms = ["response_format", *parameters.GUIDED, "text", "tools"]
        written = next((name for name in forms if body.get(name) is not None), None)
        names |= {} if written is None else {"structured_outputs": written}
    return names


def ignored_headers(jobs: Sequence[Job]) -> dict[str, str]:
    """Return the header that tells the client which keywords of its JSON schema the answer may not obey."""
    ignored = tuple(dict.fromkeys(keyword for job in jobs for keyword in job.ignored_keywords))
    return {_IGNORED_KEYWORDS: summarize_keywords(ignored, _MAX_IGNORED)} if ignored else {}
