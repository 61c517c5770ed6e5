"""The store of responses that clients come back to: in memory, for a time, in the process that has the fleet.

So every API server finds the same responses: `ResponseStore` answers verbs of the desk, which `StoredConversations`
asks.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from shoal.server.settings import ServerSettings
from shoal.wire.base import encode
from shoal.wire.fleet import StoredTurn, StoredTurns, response_names_decoder, store_response_decoder

MAX_BYTES = 8 << 20  # of a conversation; so that reading it back delays no other request
_ENTRY_BYTES = 1 << 10  # about what an entry takes beside its texts
_ID_BYTES = 200  # about what the id of an item takes
# The verbs, and answers to `KEEP`.
KEEP, READ, TURNS, ITEMS, DROP = (f"responses.{name}" for name in ("keep", "read", "turns", "items", "drop"))
KEPT, LOST, TOO_LARGE = b"kept", b"lost", b""


@dataclass(slots=True)
class _SharedTurn:
    """A turn of a conversation, held by all responses that come after it."""

    turn: StoredTurn
    holders: int = 0

    @property
    def size(self) -> int:
        return len(self.turn.items) + _ID_BYTES * len(self.turn.ids)


@dataclass(slots=True)
class _Entry:
    response: bytes
    turns: tuple[_SharedTurn, ...]  # the last one is the answer
    until: float = 0.0


@dataclass(slots=True)
class ResponseStore:
    """Responses, each with the whole conversation before it, so that it can go on even if earlier responses are gone.

    A response is removed when it was not used for `seconds`. If there are more than `most` responses, or more than
    `most_bytes`, those that were not used for the longest time are removed.

    All calls come from the desk's thread.
    """

    most: int
    most_bytes: int
    seconds: float
    clock: Callable[[], float] = time.monotonic
    size: int = 0  # about how many bytes are held
    _entries: OrderedDict[str, _Entry] = field(default_factory=OrderedDict)  # the longest unused one first
    _items: dict[str, _SharedTurn] = field(default_factory=dict)  # by the ids of items

    @classmethod
    def of(cls, settings: ServerSettings) -> "ResponseStore":
        return cls(settings.stored_responses, settings.stored_response_bytes, settings.stored_response_seconds)

    @property
    def verbs(self) -> dict[str, Callable[[bytes], bytes]]:
        """The verbs for a desk, and the methods that answer them."""
        return {KEEP: self._keep, READ: self._read, TURNS: self._turns, ITEMS: self._find, DROP: self._drop}

    def _keep(self, payload: bytes) -> bytes:
        """Store a response.

        Returns:
            `KEPT`, or `LOST` if the response before it is not stored and its turns were not sent along, or `TOO_LARGE`.
        """
        asked = store_response_decoder.decode(payload)
        before = self._used(asked.previous) if asked.previous is not None else None
        if before is None and asked.previous is not None and not asked.before:
            return LOST
        known = before.turns if before is not None else tuple(_SharedTurn(turn) for turn in asked.before)
        turns = (*known, _SharedTurn(asked.said), _SharedTurn(asked.answer))
        whole = len(asked.response) + sum(each.size for each in turns)
        if whole > min(MAX_BYTES, self.most_bytes) or not self.most:
            return TOO_LARGE
        self._remove(asked.id)
        self._entries[asked.id] = _Entry(asked.response, turns, self.clock() + self.seconds)
        self.size += len(asked.response) + _ENTRY_BYTES
        for shared in turns:
            self._hold(shared)
        while len(self._entries) > self.most or self.size > self.most_bytes:
            self._remove(next(iter(self._entries)))
        return KEPT if asked.id in self._entries else TOO_LARGE

    def _read(self, payload: bytes) -> bytes:
        """Return a response; b"" if there is none."""
        found = self._used(payload.decode())
        return b"" if found is None else found.response

    def _turns(self, payload: bytes) -> bytes:
        """Return the turns of a response's conversation, its answer included; b"" if there is no such response."""
        found = self._used(payload.decode())
        return b"" if found is None else _encoded(found.turns)

    def _find(self, payload: bytes) -> bytes:
        """Return the turns that have items with these ids. Unknown ids are ignored."""
        self._expire()
        found = {
            id(each): each for name in response_names_decoder.decode(payload).names if (each := self._items.get(name))
        }
        return _encoded(found.values())

    def _drop(self, payload: bytes) -> bytes:
        """Remove a response; return b"" if there was none."""
        found = self._used(payload.decode())
        self._remove(payload.decode())
        return b"" if found is None else b"dropped"

    def _used(self, name: str) -> _Entry | None:
        """Return a response's entry, and note that it was used."""
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
            self._remove(name)

    def _hold(self, shared: _SharedTurn) -> None:
        if not shared.holders:
            self.size += shared.size
            self._items |= dict.fromkeys(shared.turn.ids, shared)
        shared.holders += 1

    def _remove(self, name: str) -> None:
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


def _encoded(turns: Iterable[_SharedTurn]) -> bytes:
    return encode(StoredTurns(tuple(shared.turn.items for shared in turns)))
