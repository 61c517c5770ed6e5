"""The endpoints /tokenize and /detokenize: from texts to the model's tokens, and back."""

from functools import partial
from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from shoal.errors import RequestError
from shoal.server.api import body_reader
from shoal.server.api.answer_schemas import Detokenized, Tokenized
from shoal.server.api.chat import template_arguments
from shoal.server.api.request_schemas import DetokenizeBody, TokenizeBody
from shoal.server.api.service import Service, respond
from shoal.server.http.errors import error_responses, named_by_client
from shoal.text.tokenizer import Tokenizer
from shoal.values import shown

_MAX_CHARACTERS = 1 << 23  # of a text that is cut into tokens in one call


def routes(service: Service) -> APIRouter:
    router = body_reader.router("tokens")

    @router.post("/tokenize", responses={200: {"model": Tokenized}, **error_responses(404)}, response_class=Response)
    async def tokenize(body: TokenizeBody) -> Response:
        """Return the tokens of a `prompt`, or of `messages` as the chat template writes them."""
        service.model(body.model)
        return await respond(partial(_tokenized, service, body), body.size)

    @router.post(
        "/detokenize", responses={200: {"model": Detokenized}, **error_responses(404)}, response_class=Response
    )
    async def detokenize(body: DetokenizeBody) -> Response:
        """Return the text of tokens, special tokens included."""
        service.model(body.model)
        return await respond(partial(_detokenized, service, body), body.size)

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
        raise RequestError("give either prompt or messages", "prompt")
    if body.prompt is not None:
        if len(body.prompt) > _MAX_CHARACTERS:
            why = f"prompt may have at most {_MAX_CHARACTERS} characters here, got {len(body.prompt)}: send it in parts"
            raise RequestError(why, "prompt")
        try:
            body.prompt.encode()
        except UnicodeEncodeError as error:
            why = f"prompt is not valid Unicode: {error.reason} at character {error.start}"
            raise RequestError(why, "prompt") from None
        return _tokenizer(service).encode(body.prompt, add_special_tokens=body.add_special_tokens is not False)
    template = template_arguments(service, body) | {
        "tools": body.tools,
        "add_special_tokens": bool(body.add_special_tokens),
    }
    with named_by_client({"prompt": "messages"}):
        return list(service.llm.chat_tokens(body.messages, **template))


def _detokenized(service: Service, body: DetokenizeBody) -> dict[str, str]:
    tokenizer = _tokenizer(service)
    for i, token in enumerate(body.tokens):
        if token >= service.llm.vocab_size:
            why = f": {shown(token)} is not an id of the vocabulary, which has {service.llm.vocab_size} tokens"
            raise RequestError.about(f"tokens[{i}]", why)
    return {"prompt": tokenizer.decode(body.tokens, skip_special_tokens=False)}


def _tokenizer(service: Service) -> Tokenizer:
    if service.llm.tokenizer is None:
        raise RequestError("this model has no tokenizer: requests and answers have token ids only")
    return service.llm.tokenizer
