"""The ledger of requests: which replica has which request, and the sums of tokens that follow from it."""

import heapq
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from shoal.cluster.routing.capacity import ReplicaCapacity
from shoal.cluster.routing.prefixes import Node
from shoal.cluster.routing.waiting_queues import Place
from shoal.errors import EngineError

FULL = 1 << 60  # tokens of work: more than a replica ever has
_MEMORY = 1 << 18  # tokens per replica; when replicas have done twice as many, all that they have done is halved

Work = npt.NDArray[np.int64]  # [slots]


@dataclass(slots=True)
class HeldRequest:
    """A request that a replica has, with the numbers of tokens that it costs there."""

    seq: int
    prompt: int  # tokens to compute before it draws the first one here
    allowed: int  # the most tokens that it may draw here
    earlier: int  # output tokens that other replicas have drawn
    expected: int  # output tokens that it is expected to draw yet
    group: int
    prefix_end: Node | None  # the last node of its prompt in the index of prefixes
    drawn: int = 0


@dataclass(slots=True)
class _Account:
    """A replica's requests, and sums over them.

    A prompt counts as computed when the first token of its output arrives, as replicas do not report it earlier.
    """

    slot: int
    capacity: ReplicaCapacity
    held: dict[int, HeldRequest] = field(default_factory=dict)
    prompt: int = 0  # tokens of prompts that are not computed yet
    expected: int = 0  # output tokens that are expected yet
    tokens: int = 0  # tokens of its requests that take blocks; blocks found in the prefix cache do not count

    @property
    def full(self) -> bool:
        """True if it gets no more requests. Even if tokens are short, one request may wait there, to run next."""
        limits = self.capacity
        return len(self.held) >= limits.requests or (len(self.held) > 1 and self.tokens >= limits.tokens)

    @property
    def work(self) -> int:
        """An estimate of the tokens that it has yet to compute."""
        return self.prompt + self.expected


class RequestLedger:
    """The open requests, and which replica has which of them. The others wait.

    Counts of requests are lengths of these tables. Sums of tokens change in two methods only, `_add_work` and
    `_add_done`; `audit` compares them with the requests. Each replica has a slot, a small number that is used again
    after the replica is removed, as an index into arrays with an element for each replica.
    """

    def __init__(self) -> None:
        self._places: dict[int, Place] = {}  # of all open requests
        self._holders: dict[int, int] = {}  # request -> the replica that has it
        self._accounts: dict[int, _Account] = {}  # by replica
        self._groups: dict[int, dict[int, int]] = {}  # group -> slot -> how many of its requests are there
        self._arrivals = 0
        self._numbers: list[int] = []  # replicas by slot
        self._free: list[int] = []  # slots, a heap
        self.work: Work = np.full(8, FULL, np.int64)  # tokens to compute, by slot; FULL if it takes no requests
        self.done: Work = np.zeros(8, np.int64)  # tokens that were computed, by slot; old ones count less
        self._all_work = 0
        self._all_done = 0

    # --- counts ----------------------------------------------------------------------------------------------------

    @property
    def num_open(self) -> int:
        return len(self._places)

    @property
    def num_held(self) -> int:
        """The number of requests that replicas have."""
        return len(self._holders)

    @property
    def num_waiting(self) -> int:
        """The number of requests that no replica has."""
        return len(self._places) - len(self._holders)

    def is_open(self, seq: int) -> bool:
        return seq in self._places

    def holder(self, seq: int) -> int | None:
        """Return the replica that has a request; None if it waits, or is not open."""
        return self._holders.get(seq)

    def num_held_by(self, number: int) -> int:
        """Return how many requests a replica has."""
        account = self._accounts.get(number)
        return 0 if account is None else len(account.held)

    def work_of(self, number: int) -> int:
        """Return an estimate of the tokens that a replica has yet to compute."""
        return self._accounts[number].work

    def has_room(self, number: int) -> bool:
        """Return whether there is a replica with this number that takes one more request."""
        account = self._accounts.get(number)
        return account is not None and not account.full

    @property
    def any_has_room(self) -> bool:
        """True if there is a replica that takes one more request."""
        return bool(self.work.min() != FULL)

    @property
    def mean_work(self) -> int:
        return self._all_work // max(len(self._accounts), 1)

    @property
    def mean_done(self) -> int:
        return self._all_done // max(len(self._accounts), 1)

    def slots_of_group(self, group: int) -> Mapping[int, int]:
        """Return the slots at which requests of a group are, and how many are there."""
        return self._groups.get(group, {})

    # --- replicas --------------------------------------------------------------------------------------------------

    def admit(self, number: int, capacity: ReplicaCapacity) -> None:
        """Open the account of a replica, which counts as having done as much as the mean of the others."""
        if not self._free:
            self._free.append(len(self._numbers))
            self._numbers.append(number)
        slot = heapq.heappop(self._free)
        self._numbers[slot] = number
        if slot == len(self.work):
            self.work = np.concatenate([self.work, np.full(slot, FULL, np.int64)])
            self.done = np.concatenate([self.done, np.zeros(slot, np.int64)])
        self.done[slot] = self.mean_done
        self._all_done += int(self.done[slot])
        account = self._accounts[number] = _Account(slot, capacity)
        self._add_work(account)

    def remove(self, number: int) -> list[HeldRequest]:
        """Close the account of a replica. Return its requests, which wait from now on."""
        account = self._accounts[number]
        requests = list(account.held.values())
        for held in requests:
            self._take_back(account, held)
        del self._accounts[number]
        self.work[account.slot] = FULL
        self._all_done -= int(self.done[account.slot])
        heapq.heappush(self._free, account.slot)
        return requests

    def has(self, number: int) -> bool:
        return number in self._accounts

    def slot_of(self, number: int) -> int:
        return self._accounts[number].slot

    def number_of(self, slot: int) -> int:
        return self._numbers[slot]

    def capacity_of(self, number: int) -> ReplicaCapacity:
        return self._accounts[number].capacity

    # --- requests --------------------------------------------------------------------------------------------------

    def open(self, seq: int, priority: int) -> Place:
        """Note a request that waits, and return its place in the queue. A request that is open keeps its place."""
        if seq not in self._places:
            self._arrivals += 1
            self._places[seq] = (priority, self._arrivals, seq)
        return self._places[seq]

    def assign(self, number: int, held: HeldRequest) -> None:
        """Note that a replica gets a request that waits."""
        account = self._accounts[number]
        account.held[held.seq] = held
        self._holders[held.seq] = number
        if held.group >= 0:
            slots = self._groups.setdefault(held.group, {})
            slots[account.slot] = slots.get(account.slot, 0) + 1
        self._add_work(account, prompt=held.prompt, expected=held.expected, tokens=held.prompt)

    def request(self, seq: int) -> HeldRequest:
        """Return a request that a replica has."""
        return self._accounts[self._holders[seq]].held[seq]

    def drew(self, held: HeldRequest, count: int, expected: int) -> None:
        """Note that a request has drawn `count` more tokens, and is expected to draw `expected` tokens yet."""
        account = self._accounts[self._holders[held.seq]]
        prompt = 0 if held.drawn else held.prompt  # with the first token, the prompt has been computed
        self._add_done(account.slot, count + prompt)
        change, held.expected = expected - held.expected, expected
        held.drawn += count
        self._add_work(account, prompt=-prompt, expected=change, tokens=count)

    def close(self, seq: int) -> HeldRequest | None:
        """Note that a request has ended. Return it if a replica had it."""
        del self._places[seq]
        number = self._holders.get(seq)
        if number is None:
            return None
        account = self._accounts[number]
        held = account.held[seq]
        self._take_back(account, held)
        return held

    def _take_back(self, account: _Account, held: HeldRequest) -> None:
        del account.held[held.seq]
        del self._holders[held.seq]
        if held.group >= 0:
            slots = self._groups[held.group]
            slots[account.slot] -= 1
            if not slots[account.slot]:
                del slots[account.slot]
            if not slots:
                del self._groups[held.group]
        prompt = 0 if held.drawn else held.prompt
        self._add_work(account, prompt=-prompt, expected=-held.expected, tokens=-held.prompt - held.drawn)

    # --- sums ------------------------------------------------------------------------------------------------------

    def _add_work(self, account: _Account, *, prompt: int = 0, expected: int = 0, tokens: int = 0) -> None:
        """Add to a replica's sums, and to the sums over all replicas."""
        account.prompt += prompt
        account.expected += expected
        account.tokens += tokens
        self._all_work += prompt + expected
        self.work[account.slot] = FULL if account.full else account.work

    def _add_done(self, slot: int, tokens: int) -> None:
        """Add to the tokens that a replica has computed."""
        self.done[slot] += tokens
        self._all_done += tokens
        if self._all_done > 2 * _MEMORY * len(self._accounts):
            self.done //= 2
            self._all_done = self._sum_done()

    def _sum_done(self) -> int:
        return int(sum(self.done[account.slot] for account in self._accounts.values()))

    def audit(self, waiting: Iterable[int]) -> None:
        """Compare the tables and sums with each other, and with the requests that are in the waiting queues.

        Raises:
            EngineError: they differ.
        """
        wrong = [problem for number, account in self._accounts.items() for problem in self._problems(number, account)]
        held = {seq: number for number, account in self._accounts.items() for seq in account.held}
        if held != self._holders:
            wrong.append(f"replicas have {held}, but {self._holders} is noted")
        if (open_ := {*held, *waiting}) != self._places.keys():
            wrong.append(f"{len(open_)} requests wait or are at replicas, but {len(self._places)} are open")
        if int((self.work != FULL).sum()) != sum(not account.full for account in self._accounts.values()):
            wrong.append("a slot without a replica takes requests")
        if self._all_work != (work := sum(account.work for account in self._accounts.values())):
            wrong.append(f"{work} tokens are left in all, but {self._all_work} are noted")
        if self._all_done != (done := self._sum_done()):
            wrong.append(f"{done} tokens were computed in all, but {self._all_done} are noted")
        groups = [each.group for account in self._accounts.values() for each in account.held.values()]
        if sum(group >= 0 for group in groups) != sum(sum(slots.values()) for slots in self._groups.values()):
            wrong.append(f"requests at replicas are of groups {groups}, but {self._groups} are noted")
        if wrong:
            raise EngineError(f"the ledger of requests is wrong: {'; '.join(wrong)}")

    def _problems(self, number: int, account: _Account) -> Iterable[str]:
        held = account.held.values()
        prompt = sum(each.prompt for each in held if not each.drawn)
        sums = (prompt, sum(each.expected for each in held), sum(each.prompt + each.drawn for each in held))
        if sums != (account.prompt, account.expected, account.tokens):
            noted = f"{account.prompt} + {account.expected}, {account.tokens} tokens"
            yield f"replica {number}: {noted} are noted, not {sums}"
        if self.work[account.slot] != (FULL if account.full else account.work):
            yield f"replica {number}: {self.work[account.slot]} in the table, not {account.work}"
