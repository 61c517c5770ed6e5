"""`shoal scale` changes the number of replicas of a running server."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from shoal.client.http import ServerClient
from shoal.errors import EngineError

_PERIOD_S = 0.25

Replica = Mapping[str, Any]


async def scale_server(
    url: str, count: int, *, tell: Callable[[str], None], timeout: float = 600.0, api_key: str | None = None
) -> None:
    """Request `count` replicas, and wait until the server has this number and all are ready.

    `tell` gets a line for each change of a replica.

    Raises:
        UserError: the server refuses the number, or can't be reached.
        EngineError: a replica was given up, or `timeout` is over.
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
                raise EngineError(
                    f"not done within {timeout:g} s: {_summary(now)}; the server continues, and `shoal top` shows it"
                )
            before = now
            await asyncio.sleep(_PERIOD_S)
        tell(f"{_plural(count)} ready")


def changes(before: Sequence[Replica], now: Sequence[Replica]) -> list[str]:
    """Return a line for each change between two lists of replicas."""
    old = {each["number"]: each for each in before}
    lines = []
    for each in now:
        was = old.pop(each["number"], None)
        if was is None or was["state"] != each["state"]:
            ended = each["state"] in {"restarting", "failed"} and each["cause"]
            lines.append(f"replica {each['number']} is {each['state']}{f': {ended}' if ended else ''}")
    return lines + [f"replica {number} has left" for number in old]


def settled(replicas: Sequence[Replica], count: int) -> bool:
    """Return whether there are `count` replicas and all are ready.

    Raises:
        EngineError: a replica was given up.
    """
    for each in replicas:
        if each["state"] == "failed":
            raise EngineError(f"replica {each['number']} was given up: {each['cause'] or 'it does not start'}")
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
