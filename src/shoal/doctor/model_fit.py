"""At which layouts a model fits on this host. It is planned as `shoal plan` does, and nothing is started.

The weights need not be on this host: sizes follow from config.json, which is all that is fetched of a model on the hub.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.config.engine_options import EngineOptions
from shoal.doctor.kinds import failure, ok, warning
from shoal.errors import ShoalError, UserError
from shoal.launch.agreement import host_agreement
from shoal.launch.open_model import locate_files, locate_tokenizer, read_options
from shoal.planner.host_devices import describe_host
from shoal.planner.model_reader import ModelReader
from shoal.planner.placement import ReplicaHost
from shoal.planner.planner import Planner
from shoal.wire.doctor import Finding, LayoutFit
from shoal.wire.hosts import HostFacts
from shoal.wire.plan import EnginePlan, ReplicaPlace

_MAX_RANKS = 64
_SHOWN = 6


class ModelPlanner:
    """A model that can be planned in any layout, on any hosts."""

    def __init__(self, model: str, given: Mapping[str, Any]) -> None:
        """Read config.json.

        Raises:
            UserError: the model cannot be read.
        """
        self._model = model
        self._given = given
        self.options = self._options({})
        self.files = locate_files(self.options)
        self._reader = ModelReader(self.options.model_options, self.files)

    def _options(self, sizes: Mapping[str, int]) -> EngineOptions:
        return read_options(self._model, {"load_format": "dummy", **self._given, **sizes}, online=True)[0]

    def layouts(self, hosts: Sequence[HostFacts]) -> tuple[LayoutFit, ...]:
        """Plan one replica over all of these hosts, in every layout that they have devices for."""
        devices = sum(host.hardware.num_devices for host in hosts)
        sizes = candidates(min(devices, _MAX_RANKS), self._reader.spec.num_layers, len(hosts))
        return tuple(self._fit(hosts, tp, pp, devices) for tp, pp in sizes)

    def _fit(self, hosts: Sequence[HostFacts], tp: int, pp: int, devices: int) -> LayoutFit:
        def plan(replicas: int) -> EnginePlan:
            sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "data_parallel_size": replicas}
            options = self._options(sizes)
            placed = [
                ReplicaHost(options, facts, address=f"host {number}" if len(hosts) > 1 else "", here=number == 0)
                for number, facts in enumerate(hosts)
            ]
            return Planner(self._reader, placed, ReplicaPlace(0, replicas, local_size=replicas)).first_plan

        try:
            one = plan(1)
        except ShoalError as error:
            return LayoutFit(tensor_parallel_size=tp, pipeline_parallel_size=pp, fits=False, reason=str(error))
        return LayoutFit(
            tensor_parallel_size=tp,
            pipeline_parallel_size=pp,
            fits=True,
            weight_bytes=max(rank.weight_bytes for rank in one.ranks),
            kv_tokens=None if one.num_blocks is None else one.num_blocks * one.block_size,
            replicas=1 if len(hosts) > 1 else _most_replicas(plan, max(devices // (tp * pp), 1)),
        )


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """The layouts in which a model fits. `error`: the reason why it cannot be read."""

    name: str
    layouts: tuple[LayoutFit, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)  # of its files, for the comparison of hosts
    error: str = ""
    planner: ModelPlanner | None = None
    host: HostFacts | None = None  # this host


def gather(model: str, given: Mapping[str, Any]) -> ModelFacts:
    """Read a model, and plan it in every layout that this host has devices for."""
    try:
        planner = ModelPlanner(model, given)
        host = describe_host(planner.options)
        layouts = planner.layouts([host])
        return ModelFacts(model, layouts, _digests(model, given, planner), planner=planner, host=host)
    except UserError as error:
        return ModelFacts(model, error=str(error))


def _digests(model: str, given: Mapping[str, Any], planner: ModelPlanner) -> dict[str, str]:
    """Return what hosts must have in common, without the versions, which are compared anyway."""
    folder = Path(planner.files.folder)
    has_weights = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    options = read_options(model, given, online=True)[0] if has_weights else planner.options
    agreement = host_agreement(options, planner.files, str(locate_tokenizer(options, folder)))
    return {name: value for name, value in agreement.items() if "version" not in name}


def candidates(devices: int, num_layers: int, hosts: int = 1) -> list[tuple[int, int]]:
    """Return the layouts to try, as (tensor, pipeline) parallel sizes: powers of two, few ranks first.

    Each of the hosts has at least one rank.
    """
    powers = [1 << power for power in range(devices.bit_length())]
    found = [(tp, pp) for tp in powers for pp in powers if hosts <= tp * pp <= devices and pp <= num_layers]
    if (devices, 1) not in found:
        found.append((devices, 1))
    return sorted(found, key=lambda sizes: (sizes[0] * sizes[1], sizes[1]))


def _most_replicas(plan: Callable[[int], EnginePlan], most: int) -> int:
    """Return the most replicas that can be planned, between 1, which can, and `most` (found by halving)."""
    fits, fails = 1, most + 1
    count = most
    while fails - fits > 1:
        try:
            plan(count)
            fits = count
        except ShoalError:
            fails = count
        count = (fits + fails) // 2
    return fits


def check(facts: ModelFacts, where: str = "this host") -> list[Finding]:
    """Check that the model can be read, and that there is a layout in which it fits. `where`: this host, or all."""
    if facts.error:
        return [failure("model", f"{facts.name}: {facts.error}")]
    good = [layout for layout in facts.layouts if layout.fits]
    if not good:
        last = facts.layouts[-1]
        return [failure("model-fit", f"{facts.name} fits on {where} in no layout; {shown(last)}: {last.reason}")]
    names = ", ".join(map(shown, good[:_SHOWN])) + (f" and {len(good) - _SHOWN} more" if len(good) > _SHOWN else "")
    text = f"{facts.name} fits at {names}" + ("" if where == "this host" else f" over {where}")
    bad = [layout for layout in facts.layouts if not layout.fits]
    if not facts.layouts[0].fits:
        return [
            warning(
                "model-fit", f"{text}, not at {shown(bad[0])}: {bad[0].reason}", f"shoal serve MODEL {flags(good[0])}"
            )
        ]
    return [ok("model-fit", text)]


def shown(layout: LayoutFit) -> str:
    return f"tp {layout.tensor_parallel_size} x pp {layout.pipeline_parallel_size}"


def flags(layout: LayoutFit) -> str:
    return f"-tp {layout.tensor_parallel_size} -pp {layout.pipeline_parallel_size}"
