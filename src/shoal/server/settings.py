"""What the server is told, beside the engine's options."""

from dataclasses import dataclass, field

from shoal.errors import ConfigError
from shoal.launch.open_model import OpenModel
from shoal.server.tools.parsers import PARSERS


@dataclass(frozen=True, slots=True)
class ServerSettings:
    """
    Raises:
        ConfigError: values that do not go together.
    """

    served_model_names: tuple[str, ...] = ()  # the first is told where none was asked for; empty: the model's own
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # empty: none is needed
    chat_template: str | None = None  # instead of the model's: a template, or the name of one of the model's
    trust_request_chat_template: bool = False  # may a request bring a template of its own?
    tool_call_parser: str | None = None  # how the model writes tool calls; needed for tool_choice "auto"
    root_path: str = ""  # where a proxy has put the server
    allowed_origins: tuple[str, ...] = ()  # of web pages that may call the server
    max_logprobs: int = 20  # likeliest tokens that a request may ask for at a position; -1: all
    return_tokens_as_token_ids: bool = False  # where a request does not say
    max_request_bytes: int = 32 << 20  # of a body; see server.limits for why so many
    stored_responses: int = 10_000  # that /v1/responses keeps for a time; 0: none
    stored_response_bytes: int = 256 << 20  # of all of them
    stored_response_seconds: float = 3600.0  # since one was used last
    disable_docs: bool = False  # no /docs, /redoc and /openapi.json

    def __post_init__(self) -> None:
        if self.tool_call_parser is not None and self.tool_call_parser not in PARSERS:
            known = ", ".join(sorted(PARSERS))
            raise ConfigError(f"--tool-call-parser must be one of {known}, got {self.tool_call_parser}")

    def name_of(self, model: OpenModel) -> str:
        """What the model is called where one name is told."""
        return self.served_model_names[0] if self.served_model_names else model.name
