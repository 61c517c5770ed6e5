"""`shoal scale`: another number of replicas, while the server goes on."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.client.http import ServerClient
from shoal.errors import EngineError

_PERIOD_S = 0.25

Replica = Mapping[str, Any]


async def scale(
    url: str, count: int, *, tell: Callable[[str], None], timeout: float = 600.0, api_key: str | None = None
) -> None:
    """Asks for `count` replicas, and waits until the server has just so many and all are ready. What happens to each
    goes to `tell`.

    Raises:
        UserError: the server refuses, or can't be reached.
        EngineError: a replica is given up, or the time is over.
    """
    deadline = time.monotonic() + timeout
    async with ServerClient(url, api_key=api_key) as client:
        before = await _replicas(client)
        tell(f"{_plural(len(before))} now, {count} wanted")
        await client.post_json("/v1/admin/replicas", {"replicas": count})
        while True:
            now = await _replicas(client)
            for line in changes(before, now):
                tell(line)
            if settled(now, count):
                break
            if time.monotonic() > deadline:
                raise EngineError(f"not done within {timeout:g} s: {_summary(now)}; `shoal top` shows how it goes on")
            before = now
            await asyncio.sleep(_PERIOD_S)
        tell(f"{_plural(count)} ready")


def changes(before: Sequence[Replica], now: Sequence[Replica]) -> list[str]:
    """What has happened between two readings, a line each."""
    old = {each["number"]: each for each in before}
    lines = []
    for each in now:
        was = old.pop(each["number"], None)
        if was is None or was["state"] != each["state"]:
            ended = each["state"] in {"restarting", "failed"} and each["cause"]
            lines.append(f"replica {each['number']} is {each['state']}{f': {ended}' if ended else ''}")
    return lines + [f"replica {number} has left" for number in old]


def settled(replicas: Sequence[Replica], count: int) -> bool:
    """
    Raises:
        EngineError: one of them is given up.
    """
    for each in replicas:
        if each["state"] == "failed":
            raise EngineError(f"replica {each['number']} is given up: {each['cause'] or 'it does not start'}")
    return len(replicas) == count and all(each["state"] == "ready" for each in replicas)


async def _replicas(client: ServerClient) -> list[Replica]:
    status = await client.get_json("/v1/admin/status")
    found: list[Replica] = status["replicas"]
    return found


def _summary(replicas: Sequence[Replica]) -> str:
    states = [each["state"] for each in replicas]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def _plural(count: int) -> str:
    return f"{count} replica{'' if count == 1 else 's'}"
