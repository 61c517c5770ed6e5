"""GET /debug/comm: the cost of communication by replica and rank."""

import asyncio
import json

from shoal.server.app import make_app
from shoal.server.settings import ServerSettings
from shoal.wire.base import replace_fields
from shoal.wire.traffic import Traffic
from support.asgi import get
from support.fake_backend import FakeBackend
from support.fleet_status import engine, fleet, ranks, replica


def test_costs_by_replica_and_rank() -> None:
    traffic = (Traffic("tp", "all_reduce", 2, 80, 500_000, 300_000, ((3, 300_000),)),)
    of_ranks = [replace_fields(rank, traffic=traffic) for rank in ranks(busy_us=1_000_000)]
    stats = replace_fields(engine(of_ranks=of_ranks), traffic_before=traffic, busy_before=(2_000_000,))
    status = fleet(replica(1, stats=stats, host="beta"), replica(2, "starting"))
    app = make_app(FakeBackend(status=lambda: status), ServerSettings(api_keys=("secret",)))

    assert asyncio.run(get(app, "/debug/comm"))[0] == 401
    code, text = asyncio.run(get(app, "/debug/comm", headers=[(b"authorization", b"Bearer secret")]))
    assert code == 200
    first, second = json.loads(text)["replicas"]
    assert (first["number"], first["host"], first["step_s"]) == (1, "beta", 4.0)
    (cost,) = first["operations"]
    assert (cost["calls"], cost["seconds"], cost["share"]) == (6, 1.5, 0.375)  # with the former processes
    assert [(rank["rank"], rank["pid"], rank["step_s"]) for rank in first["ranks"]] == [(0, 100, 1.0), (1, 101, 1.0)]
    (cost,) = first["ranks"][1]["operations"]
    assert (cost["axis"], cost["operation"], cost["sent_bytes"], cost["moving_s"]) == ("tp", "all_reduce", 80, 0.2)
    assert cost["waited_for"] == [{"replica": 1, "rank": 1, "seconds": 0.3}]
    assert (second["operations"], second["ranks"]) == ([], [])
