"""What an engine process does before it loads: it meets those it belongs to."""

import threading
from collections.abc import Iterator

import pytest

from shoal.cluster.members.arrival import PEERS, PeersDoor
from shoal.engine import process
from shoal.engine.process import join
from shoal.errors import ConfigError
from shoal.launch.open_model import open_model
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.plan import EnginePlan, ReplicaPlace

OPTIONS = {"data_parallel_size": 2, "max_model_len": 256, "start_timeout": 60.0}


@pytest.fixture(autouse=True)
def log_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "configure_logging", lambda prefix="": None)


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    opened = open_model(None, OPTIONS)
    door = PeersDoor(size=2, agreement=opened.agreement)
    with Rendezvous(key="key", doors={PEERS: door}) as found:
        yield found


def plan(rendezvous: Rendezvous, number: int = 1, model: str | None = None, **changes: object) -> EnginePlan:
    place = ReplicaPlace(number, 2, number, 2, rendezvous=rendezvous.address, key="key")
    return open_model(model, {**OPTIONS, **changes}).plan_at(place)


def test_replicas_that_share_nothing_compare_and_part(rendezvous: Rendezvous) -> None:
    assert join(plan(rendezvous)) is None
    assert join(plan(rendezvous)) is None, "one that is started again meets nobody who minds"


def test_one_that_differs_is_refused(rendezvous: Rendezvous) -> None:
    with pytest.raises(ConfigError, match=r"its --block-size is 32, that of replica 0 \(.*\) is 16"):
        join(plan(rendezvous, block_size=32))


def test_replicas_that_share_experts_stay_together() -> None:
    with Rendezvous(key="key", reopen_rooms=True) as meeting:
        plans = [plan(meeting, number, "bundled:moe", enable_expert_parallel=True) for number in range(2)]
        found: list[object] = []
        other = threading.Thread(target=lambda: found.append(join(plans[1])))
        other.start()
        lockstep = join(plans[0])
        other.join(60)
        assert lockstep is not None
        assert lockstep.formation == 0
        (theirs,) = found
        for each in (lockstep, theirs):
            each.close()  # type: ignore[attr-defined]
