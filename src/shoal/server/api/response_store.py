"""Responses that clients come back to: kept in memory, for a time, by the process that has the fleet.

So whichever API server is asked finds them: `ResponseStore` answers verbs of the fleet server, `Shelf` asks them.
"""

import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shoal.errors import ShoalError
from shoal.log import get_logger
from shoal.server.backend import Backend
from shoal.server.http.errors import Refusal
from shoal.server.http.json_encoding import bytes_of, size_of
from shoal.server.settings import ServerSettings
from shoal.values import shown
from shoal.wire.base import encode, replace_fields
from shoal.wire.fleet import (
    ResponseNames,
    StoredTurn,
    StoredTurns,
    StoreResponse,
    response_names_decoder,
    store_response_decoder,
    stored_turns_decoder,
)

log = get_logger("responses")

_MOST_BYTES = 8 << 20  # of a conversation: reading it back keeps nobody waiting
_ENTRY_BYTES = 1 << 10  # what an entry takes beside its texts, about
_ID_BYTES = 200
_KEEP, _READ, _TURNS, _ITEMS, _DROP = (f"responses.{name}" for name in ("keep", "read", "turns", "items", "drop"))


@dataclass(eq=False, slots=True)
class _StoredTurnRecord:
    """A turn, which all responses behind it hold."""

    turn: StoredTurn
    holders: int = 0

    @property
    def size(self) -> int:
        return len(self.turn.items) + _ID_BYTES * len(self.turn.ids)


@dataclass(slots=True)
class _Entry:
    response: bytes
    turns: tuple[_StoredTurnRecord, ...]  # the last one is the answer
    until: float = 0.0


@dataclass(slots=True)
class ResponseStore:
    """What was not used for `seconds` goes; beyond `most` responses, or `most_bytes`, what was not used for longest.
    A response holds all that came before it, so that its conversation can go on whatever else has gone.

    All calls come from the thread of the fleet server.
    """

    most: int
    most_bytes: int
    seconds: float
    clock: Callable[[], float] = time.monotonic
    size: int = 0  # bytes that are held, about
    _entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)  # the longest unused first
    _items: dict[str, _StoredTurnRecord] = field(default_factory=dict)  # by the ids of items

    @classmethod
    def of(cls, settings: ServerSettings) -> "ResponseStore":
        return cls(settings.stored_responses, settings.stored_response_bytes, settings.stored_response_seconds)

    @property
    def verbs(self) -> dict[str, Callable[[bytes], bytes]]:
        """For a fleet server."""
        return {_KEEP: self._keep, _READ: self._read, _TURNS: self._turns, _ITEMS: self._find, _DROP: self._drop}

    def _keep(self, payload: bytes) -> bytes:
        """b"kept"; b"lost": what came before is not there, and wasn't sent along; b"": it is too large."""
        asked = store_response_decoder.decode(payload)
        before = self._used(asked.previous) if asked.previous is not None else None
        if before is None and asked.previous is not None and not asked.before:
            return b"lost"
        known = before.turns if before is not None else tuple(_StoredTurnRecord(turn) for turn in asked.before)
        turns = (*known, _StoredTurnRecord(asked.said), _StoredTurnRecord(asked.answer))
        whole = len(asked.response) + sum(each.size for each in turns)
        if whole > min(_MOST_BYTES, self.most_bytes) or not self.most:
            return b""
        self._forget(asked.id)
        self._entries[asked.id] = _Entry(asked.response, turns, self.clock() + self.seconds)
        self.size += len(asked.response) + _ENTRY_BYTES
        for shared in turns:
            self._hold(shared)
        while len(self._entries) > self.most or self.size > self.most_bytes:
            self._forget(next(iter(self._entries)))
        return b"kept" if asked.id in self._entries else b""

    def _read(self, payload: bytes) -> bytes:
        """The response; b"": there is none."""
        found = self._used(payload.decode())
        return b"" if found is None else found.response

    def _turns(self, payload: bytes) -> bytes:
        """Its conversation's turns, the answer included; b"": there is none."""
        found = self._used(payload.decode())
        return b"" if found is None else _told(found.turns)

    def _find(self, payload: bytes) -> bytes:
        """Turns that have the items of these ids, as far as there are any."""
        self._expire()
        found = {
            id(each): each for name in response_names_decoder.decode(payload).names if (each := self._items.get(name))
        }
        return _told(found.values())

    def _drop(self, payload: bytes) -> bytes:
        found = self._used(payload.decode())
        self._forget(payload.decode())
        return b"" if found is None else b"dropped"

    def _used(self, name: str) -> _Entry | None:
        self._expire()
        found = self._entries.get(name)
        if found is not None:
            found.until = self.clock() + self.seconds
            self._entries.move_to_end(name)
        return found

    def _expire(self) -> None:
        now = self.clock()
        while self._entries:
            name, entry = next(iter(self._entries.items()))
            if entry.until > now:
                return
            self._forget(name)

    def _hold(self, shared: _StoredTurnRecord) -> None:
        if not shared.holders:
            self.size += shared.size
            self._items |= dict.fromkeys(shared.turn.ids, shared)
        shared.holders += 1

    def _forget(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is None:
            return
        self.size -= len(entry.response) + _ENTRY_BYTES
        for shared in entry.turns:
            shared.holders -= 1
            if not shared.holders:
                self.size -= shared.size
                for each in shared.turn.ids:
                    if self._items.get(each) is shared:
                        del self._items[each]


def _told(turns: Iterable[_StoredTurnRecord]) -> bytes:
    return encode(StoredTurns(tuple(shared.turn.items for shared in turns)))


def _turn(items: Sequence[Any]) -> StoredTurn:
    return StoredTurn(bytes_of(items), tuple(_sendable(item.get("id") for item in items)))


def _sendable(names: Iterable[object]) -> list[str]:
    """Those that a message can carry: JSON can say half a surrogate pair, which is no text."""
    return [name for name in names if isinstance(name, str) and name.encode("utf-8", "replace").decode() == name]


class Shelf:
    """The store, as endpoints see it, in whichever process it is."""

    def __init__(self, llm: Backend, settings: ServerSettings) -> None:
        self._llm = llm
        self.open = settings.stored_responses > 0
        self.seconds = settings.stored_response_seconds

    def missing(self, name: str, param: str, code: str | None = None) -> Refusal:
        """There is no such response here."""
        why = (
            f"it is older than {self.seconds:g} s, has given way to newer ones, or was never stored (store: false)"
            if self.open
            else "this server stores none (--stored-responses 0)"
        )
        way_out = "send the whole conversation as input, without previous_response_id"
        return Refusal(404, f"there is no response {shown(name)} here: {why}; {way_out}", param=param, code=code)

    async def keep(
        self,
        name: str,
        response: dict[str, Any],
        said: Sequence[Any],
        answer: Sequence[Any],
        previous: str | None,
        before: Sequence[Any],
    ) -> bool:
        """Was it taken? One that is too large is not. `before`: all items of the conversation up to `previous`."""
        if size_of(said) + size_of(answer) > _MOST_BYTES:  # without the time that writing it down would take
            return False
        asked = StoreResponse(name, bytes_of(response), _turn(said), _turn(answer), previous)
        try:
            told = await self._llm.ask(_KEEP, encode(asked))
            if told == b"lost":  # it has gone while this one was made
                told = await self._llm.ask(_KEEP, encode(replace_fields(asked, before=(_turn(before),))))
        except ShoalError as error:
            log.warning("the response %s could not be stored: %s", name, error)
            return False
        return told == b"kept"

    async def read(self, name: str) -> bytes | None:
        """A response, in JSON."""
        return await self._ask(_READ, name) or None

    async def conversation(self, name: str) -> list[list[Any]] | None:
        """The turns up to a response, its answer included."""
        found = await self._ask(_TURNS, name)
        return [json.loads(turn) for turn in stored_turns_decoder.decode(found).turns] if found else None

    async def items(self, names: Sequence[str]) -> dict[str, Any]:
        """Items of stored conversations by their ids, as far as there are any."""
        known = _sendable(names)
        if not known or not self.open:
            return {}
        found = await self._llm.ask(_ITEMS, encode(ResponseNames(tuple(known))))
        turns = [json.loads(turn) for turn in stored_turns_decoder.decode(found).turns]
        return {item["id"]: item for turn in turns for item in turn if "id" in item}

    async def drop(self, name: str) -> bool:
        """Was it there?"""
        return bool(await self._ask(_DROP, name))

    async def _ask(self, verb: str, name: str) -> bytes:
        return await self._llm.ask(verb, name.encode("utf-8", "replace")) if self.open else b""
