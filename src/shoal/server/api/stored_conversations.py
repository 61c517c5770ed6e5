"""The stored responses and their conversations, as the endpoints of any API server see them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from shoal.errors import ShoalError
from shoal.log import get_logger
from shoal.server.api.response_store import DROP, ITEMS, KEEP, KEPT, LOST, MAX_BYTES, READ, TURNS
from shoal.server.backend import Backend
from shoal.server.http.errors import HttpError
from shoal.server.http.json_encoding import bytes_of, size_of
from shoal.server.settings import ServerSettings
from shoal.values import shown
from shoal.wire.base import encode, replace_fields
from shoal.wire.fleet import ResponseNames, StoredTurn, StoreResponse, stored_turns_decoder

log = get_logger("responses")


class StoredConversations:
    """Asks the process that has the store."""

    def __init__(self, llm: Backend, settings: ServerSettings) -> None:
        self._llm = llm
        self.enabled = settings.stored_responses > 0
        self._seconds = settings.stored_response_seconds

    def missing(self, name: str, param: str, code: str | None = None) -> HttpError:
        """Return the error for a response that is not stored. `param`: the field that names it."""
        why = (
            f"it is older than {self._seconds:g} s, was removed for newer ones, or was never stored (store: false)"
            if self.enabled
            else "this server stores no responses (--stored-responses 0)"
        )
        way_out = "send the whole conversation as input, without previous_response_id"
        return HttpError(404, f"there is no response {shown(name)} here: {why}; {way_out}", param=param, code=code)

    async def keep(
        self,
        name: str,
        response: dict[str, Any],
        said: Sequence[Any],
        answer: Sequence[Any],
        previous: str | None,
        before: Sequence[Any],
    ) -> bool:
        """Store a response, and return whether it was stored: one that is too large is not.

        Args:
            said: the items of the request.
            answer: the items of the response.
            previous: the id of the response that it continues.
            before: all items of the conversation up to that one.
        """
        if size_of(said) + size_of(answer) > MAX_BYTES:  # found out without the time that encoding it would take
            return False
        asked = StoreResponse(name, bytes_of(response), _turn(said), _turn(answer), previous)
        try:
            outcome = await self._llm.ask(KEEP, encode(asked))
            if outcome == LOST:  # the earlier response was removed in the meantime
                outcome = await self._llm.ask(KEEP, encode(replace_fields(asked, before=(_turn(before),))))
        except ShoalError as error:
            log.warning("the response %s could not be stored: %s", name, error)
            return False
        return outcome == KEPT

    async def read(self, name: str) -> bytes | None:
        """Return a response as JSON; None if it is not stored."""
        return await self._ask(READ, name) or None

    async def conversation(self, name: str) -> list[list[Any]] | None:
        """Return the turns up to a response, its answer included; None if it is not stored."""
        found = await self._ask(TURNS, name)
        return [json.loads(turn) for turn in stored_turns_decoder.decode(found).turns] if found else None

    async def items(self, names: Sequence[str]) -> dict[str, Any]:
        """Return items of stored conversations by their ids. Unknown ids are left out."""
        known = _valid_unicode(names)
        if not known or not self.enabled:
            return {}
        found = await self._llm.ask(ITEMS, encode(ResponseNames(tuple(known))))
        turns = [json.loads(turn) for turn in stored_turns_decoder.decode(found).turns]
        return {item["id"]: item for turn in turns for item in turn if "id" in item}

    async def drop(self, name: str) -> bool:
        """Delete a response, and return whether it was there."""
        return bool(await self._ask(DROP, name))

    async def _ask(self, verb: str, name: str) -> bytes:
        return await self._llm.ask(verb, name.encode("utf-8", "replace")) if self.enabled else b""


def _turn(items: Sequence[Any]) -> StoredTurn:
    return StoredTurn(bytes_of(items), tuple(_valid_unicode(item.get("id") for item in items)))


def _valid_unicode(names: Iterable[object]) -> list[str]:
    """Return the names that a message can carry: not those with half of a surrogate pair."""
    return [name for name in names if isinstance(name, str) and name.encode("utf-8", "replace").decode() == name]
