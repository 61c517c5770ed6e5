"""/tokenize and /detokenize: between texts and tokens, as the model has them."""

from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from shoal.errors import RequestError
from shoal.server.api import bodies
from shoal.server.api.chat import template_of
from shoal.server.api.schemas import DetokenizeBody, Detokenized, TokenizeBody, Tokenized
from shoal.server.api.start_requests import Service, respond
from shoal.server.http.errors import Refusal, documented, of_request
from shoal.text.tokenizer import Tokenizer
from shoal.values import shown

_MOST_CHARACTERS = 1 << 23  # of a text that is cut at once


def routes(service: Service) -> APIRouter:
    router = bodies.router("tokens")

    @router.post("/tokenize", responses={200: {"model": Tokenized}, **documented(404)}, response_class=Response)
    async def tokenize(body: TokenizeBody) -> Response:
        """The tokens of a `prompt`, or of `messages` by the chat template."""
        service.model(body.model)
        return await respond(partial(_tokenized, service, body), body.weight)

    @router.post("/detokenize", responses={200: {"model": Detokenized}, **documented(404)}, response_class=Response)
    async def detokenize(body: DetokenizeBody) -> Response:
        """The text of tokens, special ones included."""
        service.model(body.model)
        return await respond(partial(_detokenized, service, body), body.weight)

    return router


def _tokenized(service: Service, body: TokenizeBody) -> dict[str, Any]:
    tokens = _tokens(service, body)
    found: dict[str, Any] = {
        "count": len(tokens),
        "max_model_len": service.llm.max_model_len,
        "tokens": tokens,
        "token_strs": None,
    }
    if body.return_token_strs:
        tokenizer = _tokenizer(service)
        found["token_strs"] = [tokenizer.token_text(token) for token in tokens]
    return found


def _tokens(service: Service, body: TokenizeBody) -> list[int]:
    if (body.prompt is None) == (body.messages is None):
        raise Refusal(400, "give either prompt or messages", param="prompt")
    if body.prompt is not None:
        if len(body.prompt) > _MOST_CHARACTERS:
            why = f"prompt may have {_MOST_CHARACTERS} characters here, got {len(body.prompt)}: send it in parts"
            raise Refusal(400, why, param="prompt")
        try:
            body.prompt.encode()
        except UnicodeEncodeError as error:
            why = f"prompt is not valid Unicode: {error.reason} at character {error.start}"
            raise Refusal(400, why, param="prompt") from None
        return _tokenizer(service).encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    template = template_of(service, body) | {"tools": body.tools, "add_special_tokens": bool(body.add_special_tokens)}
    try:
        return list(service.llm.chat_tokens(body.messages, **template))
    except RequestError as error:
        raise of_request(error, prompt="messages") from None


def _detokenized(service: Service, body: DetokenizeBody) -> dict[str, str]:
    tokenizer = _tokenizer(service)
    for i, token in enumerate(body.tokens):
        if token >= service.llm.vocab_size:
            why = f"{shown(token)} is no id of a vocabulary of {service.llm.vocab_size}"
            raise Refusal(400, f"tokens[{i}]: {why}", param=f"tokens[{i}]")
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _tokenizer(service: Service) -> Tokenizer:
    if service.llm.tokenizer is None:
        raise Refusal(400, "this model has no tokenizer: it takes and gives token ids alone")
    return service.llm.tokenizer
