"""GET /v1/admin/status returns every field of the status under its name."""

import json
from urllib.request import urlopen

from shoal import __version__
from shoal.server.operations.status import status_json
from shoal.wire.base import replace_fields
from shoal.wire.traffic import Traffic
from support.fleet_status import engine, fleet, ranks, replica
from support.status_server import StatusServer


def test_every_field_has_its_name() -> None:
    traffic = (Traffic("tp", "all_reduce", 3, 4096, 70, 50, ((1, 50),)),)
    rank = replace_fields(ranks()[0], traffic=traffic)
    stats = replace_fields(
        engine(running=3, free=40, of_ranks=[rank]), start_s=(("load", 0.5),), iteration_tokens=(1, 2)
    )
    status = fleet(replica(0, host="alpha", stats=stats), replica(1, "restarting", host="beta", cause="rank 1 died"))

    shown = json.loads(json.dumps(status_json(status)))

    assert set(shown) == {*status.__struct_fields__, "version"}
    assert shown["version"] == __version__
    assert set(shown["replicas"][0]) == set(status.replicas[0].__struct_fields__)
    assert set(shown["replicas"][0]["stats"]) == set(stats.__struct_fields__)
    assert shown["replicas"][0]["stats"]["start_s"] == [["load", 0.5]]
    shown_rank = shown["replicas"][0]["stats"]["ranks"][0]
    assert set(shown_rank) == {*rank.__struct_fields__, "host"}
    assert (shown_rank["host"], shown_rank["pid"]) == ("alpha", 100)
    times = {"us": 70, "waited_us": 50, "waited_for": [[1, 50]]}
    assert shown_rank["traffic"] == [{"axis": "tp", "operation": "all_reduce", "count": 3, "sent_bytes": 4096, **times}]
    assert shown["replicas"][1]["stats"] is None
    assert shown["replicas"][1]["cause"] == "rank 1 died"


def test_the_answer_is_never_cached() -> None:
    status = fleet(replica(0, stats=engine(running=7)))
    with (
        StatusServer(lambda: status) as server,
        urlopen(f"{server.url}/v1/admin/status", timeout=60) as answer,
    ):
        assert answer.headers["Cache-Control"] == "no-store"
        assert json.load(answer)["replicas"][0]["stats"]["running"] == 7
