"""`shoal serve`: an OpenAI-compatible server."""

import json
from pathlib import Path
from typing import Any

import click

from shoal import env
from shoal.cli.numbers import FloatRange, IntRange
from shoal.cli.options import GroupedCommand, engine_values, serving_flags
from shoal.errors import ConfigError
from shoal.launch.early_failure import told_to_other_hosts
from shoal.launch.open_model import open_model
from shoal.values import parse_bytes, shown

_LEVELS = ("critical", "error", "warning", "info", "debug", "trace")


@click.command(cls=GroupedCommand)
@click.argument("model", required=False)
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="address to listen on; 0.0.0.0: all addresses of this host; [::]: those of IPv6 too",
)
@click.option(
    "--port", default=8000, show_default=True, type=IntRange(0, 65535), help="port to listen on; 0: a free one"
)
@click.option(
    "--api-key",
    "api_keys",
    multiple=True,
    envvar=list(env.API_KEY),
    metavar="KEY",
    help="key that clients must send; may be given several times",
)
@click.option(
    "--served-model-name",
    "served_model_names",
    multiple=True,
    metavar="NAME",
    help="name of the model for clients; may be given several times",
)
@click.option(
    "--chat-template", metavar="FILE", help="Jinja template to use instead of the model's: a file, or the text"
)
@click.option(
    "--trust-request-chat-template", is_flag=True, help="allow a chat template in requests; a template is a program"
)
@click.option(
    "--tool-call-parser",
    metavar="NAME",
    help="form of the model's tool calls: hermes, llama3_json, mistral, pythonic; needed for tool_choice auto",
)
@click.option(
    "--enable-auto-tool-choice", is_flag=True, help="allow tool_choice auto; --tool-call-parser alone does so too"
)
@click.option(
    "--max-logprobs", default=20, show_default=True, help="the most logprobs that a request may ask for; -1: any number"
)
@click.option(
    "--return-tokens-as-token-ids",
    is_flag=True,
    help="write tokens as token_id:17 in logprobs, unless a request says otherwise",
)
@click.option(
    "--max-request-bytes", default="32MiB", show_default=True, metavar="BYTES", help="the largest body of a request"
)
@click.option(
    "--stored-responses",
    default=10_000,
    show_default=True,
    type=click.IntRange(0),
    help="responses of /v1/responses that are kept in memory, for previous_response_id; 0: none",
)
@click.option(
    "--stored-response-bytes",
    default="256MiB",
    show_default=True,
    metavar="BYTES",
    help="the largest size of all stored responses together",
)
@click.option(
    "--stored-response-seconds",
    default=3600.0,
    show_default=True,
    type=click.FloatRange(0),
    help="time for which a stored response is kept after its last use",
)
@click.option(
    "--disable-docs",
    "--disable-fastapi-docs",
    "disable_docs",
    is_flag=True,
    help="do not serve /docs, /redoc and /openapi.json",
)
@click.option("--root-path", default="", metavar="PATH", help="path under which a proxy serves this server")
@click.option(
    "--allowed-origins",
    multiple=True,
    metavar="ORIGIN",
    help="web pages that may call the server; *: all; may be given several times",
)
@click.option("--ssl-keyfile", metavar="FILE", help="private key of the certificate, for HTTPS")
@click.option("--ssl-certfile", metavar="FILE", help="certificate, for HTTPS")
@click.option(
    "--api-server-count",
    "-asc",
    default=1,
    show_default=True,
    type=IntRange(1, 256),
    help="processes that answer HTTP requests; all of them use the same replicas",
)
@click.option(
    "--shutdown-timeout",
    default=60.0,
    show_default=True,
    type=FloatRange(0),
    help="seconds that running requests may still take after SIGTERM",
)
@click.option(
    "--uvicorn-log-level",
    default="warning",
    show_default=True,
    type=click.Choice(_LEVELS),
    help="level of the HTTP server's log; info: a line for each request",
)
@serving_flags
def serve(
    model: str | None,
    host: str,
    port: int,
    api_keys: tuple[str, ...],
    served_model_names: tuple[str, ...],
    chat_template: str | None,
    tool_call_parser: str | None,
    max_request_bytes: str,
    stored_response_bytes: str,
    root_path: str,
    allowed_origins: tuple[str, ...],
    ssl_keyfile: str | None,
    ssl_certfile: str | None,
    *,
    trust_request_chat_template: bool,
    enable_auto_tool_choice: bool,
    max_logprobs: int,
    return_tokens_as_token_ids: bool,
    stored_responses: int,
    stored_response_seconds: float,
    disable_docs: bool,
    api_server_count: int,
    shutdown_timeout: float,
    uvicorn_log_level: str,
    **flags: Any,
) -> int:
    """Serve the OpenAI API. MODEL is a folder or an id on the Hugging Face hub; without it, the bundled model is used.

    A replica that fails is restarted, and its requests go on. After SIGTERM the server ends when its requests have
    ended.
    """
    # The web libraries are needed by this command only, and take a while to load.
    from shoal.server.http.listening import Listening
    from shoal.server.serve import run
    from shoal.server.settings import ServerSettings

    values = engine_values(flags)
    with told_to_other_hosts(values):
        if enable_auto_tool_choice and tool_call_parser is None:
            raise ConfigError("--enable-auto-tool-choice needs --tool-call-parser, the form of the model's tool calls")
        settings = ServerSettings(
            served_model_names=served_model_names,
            api_keys=api_keys,
            chat_template=_template(chat_template),
            trust_request_chat_template=trust_request_chat_template,
            tool_call_parser=tool_call_parser,
            max_logprobs=max_logprobs,
            return_tokens_as_token_ids=return_tokens_as_token_ids,
            max_request_bytes=parse_bytes(max_request_bytes, "--max-request-bytes"),
            stored_responses=stored_responses,
            stored_response_bytes=parse_bytes(stored_response_bytes, "--stored-response-bytes"),
            stored_response_seconds=stored_response_seconds,
            disable_docs=disable_docs,
            root_path=root_path,
            allowed_origins=_origins(allowed_origins),
        )
    listening = Listening(host, port, uvicorn_log_level, ssl_keyfile, ssl_certfile)
    if values.get("node_rank"):
        from shoal.launch import node

        return node.run(model, values, online=True)
    if values.get("headless"):
        from shoal.launch import headless

        return headless.run(model, values)
    with told_to_other_hosts(values):
        opened = open_model(model, values, own_process=True, online=True)
    return run(opened, settings, listening, api_server_count=api_server_count, shutdown_timeout=shutdown_timeout)


def _origins(given: tuple[str, ...]) -> tuple[str, ...]:
    """Return all origins; each value may be one, or a JSON list of them as for vLLM."""
    found: list[str] = []
    for each in given:
        try:
            listed = json.loads(each) if each.startswith("[") else [each]
        except (ValueError, RecursionError):
            listed = None
        if not isinstance(listed, list) or not all(isinstance(origin, str) for origin in listed):
            raise ConfigError(f"--allowed-origins takes an origin or a JSON list of them, got {shown(each)}")
        found += listed
    return tuple(found)


def _template(given: str | None) -> str | None:
    """Return a template's text. The value is a path, or the text itself, which has a brace."""
    if given is None or "{" in given:
        return given
    try:
        return Path(given).read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--chat-template {given} can't be read: {error}") from None
