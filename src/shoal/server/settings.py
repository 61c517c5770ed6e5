"""The options of the HTTP server, apart from those of the engine."""

from dataclasses import dataclass, field

from shoal.errors import ConfigError
from shoal.launch.open_model import OpenModel
from shoal.openai.tools.parsers import PARSERS


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """Options of the HTTP server.

    Raises:
        ConfigError: an option has no such value.
    """

    served_model_names: tuple[
        str, ...
    ] = ()  # names of the model, the first for requests that give none; empty: the model's own name
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # keys that clients may send; empty: no key is needed
    chat_template: str | None = None  # a template, or the name of one of the model's; None: the model's default
    trust_request_chat_template: bool = False  # True: requests may bring a template of their own
    tool_call_parser: str | None = None  # the format of the model's tool calls; tool_choice "auto" needs it
    root_path: str = ""  # path prefix under which a proxy serves us
    allowed_origins: tuple[str, ...] = ()  # origins of web pages that may call the server
    max_logprobs: int = 20  # most log-probabilities that a request may ask for at each position; -1: all
    return_tokens_as_token_ids: bool = False  # for requests that do not say
    max_request_bytes: int = 32 << 20  # of a body; `http.limits` explains the number
    stored_responses: int = 10_000  # responses that /v1/responses keeps for a time; 0: none
    stored_response_bytes: int = 256 << 20  # of all stored responses together
    stored_response_seconds: float = 3600.0  # since a response was last used
    disable_docs: bool = False  # True: no /docs, /redoc and /openapi.json

    def __post_init__(self) -> None:
        if self.tool_call_parser is not None and self.tool_call_parser not in PARSERS:
            known = ", ".join(sorted(PARSERS))
            raise ConfigError(f"--tool-call-parser must be one of {known}, got {self.tool_call_parser}")

    def name_of(self, model: OpenModel) -> str:
        """Return the name of the model where only one is given."""
        return self.served_model_names[0] if self.served_model_names else model.name
