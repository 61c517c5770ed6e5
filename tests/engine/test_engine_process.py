"""An engine process meets the other replicas before it loads."""

import threading
from collections.abc import Iterator

import pytest

from shoal.cluster.replicas.rendezvous_doors import PeersDoor
from shoal.engine import process
from shoal.engine.process import join_lockstep
from shoal.errors import ConfigError
from shoal.launch.open_model import open_model
from shoal.transport.rendezvous import Rendezvous
from shoal.wire.credentials import Credentials
from shoal.wire.plan import EnginePlan, ReplicaPlace
from shoal.wire.rendezvous import PEERS_DOOR

OPTIONS = {"data_parallel_size": 2, "max_model_len": 256, "start_timeout": 60.0}


@pytest.fixture(autouse=True)
def log_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "configure_logging", lambda prefix="": None)


@pytest.fixture
def rendezvous() -> Iterator[Rendezvous]:
    opened = open_model(None, OPTIONS)
    door = PeersDoor(size=2, agreement=opened.agreement)
    with Rendezvous(credentials=Credentials("key"), doors={PEERS_DOOR: door}) as found:
        yield found


def plan(rendezvous: Rendezvous, number: int = 1, model: str | None = None, **changes: object) -> EnginePlan:
    place = ReplicaPlace(number, 2, number, 2, rendezvous=rendezvous.address, credentials=Credentials("key"))
    return open_model(model, {**OPTIONS, **changes}).plan_at(place)


def test_replicas_that_share_nothing_compare_their_agreements_and_disconnect(rendezvous: Rendezvous) -> None:
    assert join_lockstep(plan(rendezvous)) is None
    assert join_lockstep(plan(rendezvous)) is None, "a replica that is started again is not refused"


def test_a_replica_with_other_options_is_refused(rendezvous: Rendezvous) -> None:
    with pytest.raises(ConfigError, match=r"its --block-size is 32, that of replica 0 \(.*\) is 16"):
        join_lockstep(plan(rendezvous, block_size=32))


def test_replicas_that_share_experts_stay_connected() -> None:
    with Rendezvous(credentials=Credentials("key"), reopen_rooms=True) as meeting:
        plans = [plan(meeting, number, "bundled:moe", enable_expert_parallel=True) for number in range(2)]
        found: list[object] = []
        other = threading.Thread(target=lambda: found.append(join_lockstep(plans[1])))
        other.start()
        lockstep = join_lockstep(plans[0])
        other.join(60)
        assert lockstep is not None
        assert lockstep.formation == 0
        (theirs,) = found
        for each in (lockstep, theirs):
            each.close()  # type: ignore[attr-defined]
