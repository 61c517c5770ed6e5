"""The places at which replicas of a fleet meet those of other hosts. Nothing is started."""

from typing import Any

import pytest

from shoal.launch import launchers
from shoal.launch.deployment import Deployment
from shoal.launch.open_model import open_model
from shoal.wire.credentials import Credentials
from shoal.wire.plan import ReplicaPlace

MEETING = "127.0.0.1:29550"


def launches(
    monkeypatch: pytest.MonkeyPatch, model: str | None, numbers: list[int], **options: Any
) -> list[ReplicaPlace]:
    """Return the places of replicas that are started in this order, on a host with replicas 1 and 2 of 4."""
    places: list[ReplicaPlace] = []
    monkeypatch.setattr(launchers, "EngineProcess", lambda module, plan, **_: places.append(plan.place))
    hosts = {"data_parallel_address": "127.0.0.1", "data_parallel_size": 4, "data_parallel_hybrid_lb": True}
    local = {"data_parallel_start_rank": 1, "data_parallel_size_local": 2, "max_model_len": 64}
    opened = open_model(model, {**hosts, **local, **options}, online=True)
    numbers_here = Deployment.of(opened.options).local
    launch = launchers.ProcessLauncher(
        opened, numbers_here, rendezvous=MEETING, credentials=Credentials("key"), compared=numbers_here
    )
    for number in numbers:
        launch(number, 0)
    return places


def test_peers_compare_at_their_first_start_and_added_replicas_never(monkeypatch: pytest.MonkeyPatch) -> None:
    places = launches(monkeypatch, None, [1, 2, 4, 1, 4])
    assert [place.rendezvous for place in places] == [MEETING, MEETING, "", "", ""]
    assert [(place.rank, place.size) for place in places] == [(1, 4), (2, 4), (4, 5), (1, 4), (4, 5)]


def test_replicas_that_share_experts_meet_at_every_start(monkeypatch: pytest.MonkeyPatch) -> None:
    places = launches(monkeypatch, "bundled:moe", [1, 2, 1, 2], enable_expert_parallel=True)
    assert [place.rendezvous for place in places] == [MEETING] * 4
    assert [place.returning for place in places] == [False, False, True, True]
