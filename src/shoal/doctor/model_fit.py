"""At which layouts a model fits on this host. It is planned as `shoal plan` does, and nothing is started.

The weights need not be on this host: sizes follow from config.json, which is all that is fetched of a model on the hub.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shoal.doctor.kinds import failure, ok, warning
from shoal.errors import ShoalError, UserError
from shoal.launch.agreement import host_agreement
from shoal.launch.open_model import locate_files, locate_tokenizer, read_options
from shoal.planner.host_devices import describe_host
from shoal.planner.model_reader import ModelReader
from shoal.planner.planner import Planner
from shoal.wire.doctor import Finding, LayoutFit
from shoal.wire.hosts import HostFacts
from shoal.wire.plan import EnginePlan, ReplicaPlace

_MAX_RANKS = 64
_SHOWN = 6


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """Where a model fits. `error`: why it cannot be read."""

    name: str
    layouts: tuple[LayoutFit, ...] = ()
    digests: Mapping[str, str] = field(default_factory=dict)  # of its files, for the comparison of hosts
    error: str = ""


def gather(model: str, given: Mapping[str, Any]) -> ModelFacts:
    """Read a model, and plan it in every layout that this host has devices for."""
    try:
        options, _ = read_options(model, {"load_format": "dummy", **given}, online=True)
        files = locate_files(options)
        reader = ModelReader(options.model_options, files)
        host = describe_host(options)
        layouts = [_fit(model, given, reader, host, tp, pp) for tp, pp in candidates(host, reader.spec.num_layers)]
        tokenizer = str(locate_tokenizer(options, Path(files.folder)))
        weights = any(Path(files.folder).glob("*.safetensors")) or any(Path(files.folder).glob("pytorch_model*.bin"))
        if weights:
            options, _ = read_options(model, given, online=True)
        agreement = host_agreement(options, files, tokenizer)
        digests = {
            name: value for name, value in agreement.items() if "version" not in name
        }  # these are compared anyway
        return ModelFacts(model, tuple(layouts), digests)
    except UserError as error:
        return ModelFacts(model, error=str(error))


def candidates(host: HostFacts, num_layers: int) -> Iterator[tuple[int, int]]:
    """Yield the layouts to try, as (tensor, pipeline) parallel sizes: powers of two, few ranks first."""
    devices = min(host.hardware.num_devices, _MAX_RANKS)
    powers = [1 << power for power in range(devices.bit_length())]
    found = [(tp, pp) for tp in powers for pp in powers if tp * pp <= devices and pp <= num_layers]
    if (devices, 1) not in found:
        found.append((devices, 1))
    yield from sorted(found, key=lambda sizes: (sizes[0] * sizes[1], sizes[1]))


def _fit(model: str, given: Mapping[str, Any], reader: ModelReader, host: HostFacts, tp: int, pp: int) -> LayoutFit:
    def plan(replicas: int) -> EnginePlan:
        sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "data_parallel_size": replicas}
        options, _ = read_options(model, {"load_format": "dummy", **given, **sizes}, online=True)
        return Planner(options, reader, host, ReplicaPlace(0, replicas, local_size=replicas)).first_plan

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
        replicas=_most_replicas(plan, max(host.hardware.num_devices // (tp * pp), 1)),
    )


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


def check(facts: ModelFacts) -> list[Finding]:
    """Check that the model can be read, and that there is a layout in which it fits."""
    if facts.error:
        return [failure("model", f"{facts.name}: {facts.error}")]
    good = [layout for layout in facts.layouts if layout.fits]
    if not good:
        last = facts.layouts[-1]
        return [failure("model-fit", f"{facts.name} fits on this host in no layout; {shown(last)}: {last.reason}")]
    names = ", ".join(map(shown, good[:_SHOWN])) + (f" and {len(good) - _SHOWN} more" if len(good) > _SHOWN else "")
    text = f"{facts.name} fits at {names}"
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
