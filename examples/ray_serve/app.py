"""The OpenAI API of Shoal under Ray Serve, with autoscaling. README.md beside this file has the commands.

Each replica of the deployment is a server with an engine of its own. Serve makes a placement group for it: a bundle for
the actor of the replica, and a bundle for the ranks of each pipeline stage. Shoal runs its ranks there.
"""

import asyncio
import json
from typing import Any, Literal

import ray
from pydantic import (
    BaseModel,
    ConfigDict,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
)
from ray import serve
from ray.serve import Application, Deployment
from starlette.types import ASGIApp, Receive, Scope, Send

from shoal.config.engine_options import from_environment
from shoal.errors import EngineError
from shoal.launch.open_model import open_model
from shoal.llm.async_llm import AsyncLLM
from shoal.log import configure_logging
from shoal.server.app import make_app
from shoal.server.operations.ray_export import export_to_ray
from shoal.server.settings import ServerSettings
from shoal.server.start_llm import start_llm


class Arguments(BaseModel):
    """The arguments of `build`. On the command line of `serve run` they are `name=value`, in a config file `args`."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())

    model: str | None = None  # a folder, an id on the hub; None: the bundled model
    tensor_parallel_size: PositiveInt = 1
    pipeline_parallel_size: PositiveInt = 1
    device: Literal["auto", "cuda", "cpu"] = "auto"  # auto: cuda if the cluster has GPUs when the application is built
    min_replicas: NonNegativeInt = 1
    max_replicas: PositiveInt = 1
    target_ongoing_requests: PositiveFloat = 32  # of a replica, on average; with more, Serve starts another one
    upscale_delay_s: NonNegativeFloat = 30  # how long there must be more requests before a replica is added
    downscale_delay_s: NonNegativeFloat = 600  # how long there must be fewer requests before one is taken out
    max_ongoing_requests: PositiveInt = 256  # of a replica; with more, requests wait for a replica in Serve
    shutdown_timeout: NonNegativeFloat = 60  # seconds that requests have to finish when a replica is taken out
    engine: dict[str, Any] = {}  # further options of the engine: {"max_model_len": 4096, ...}
    server: dict[str, Any] = {}  # fields of `ServerSettings`: {"served_model_names": ["my-model"], ...}

    @field_validator("engine", "server", mode="before")
    @classmethod
    def _read_json(cls, value: Any) -> Any:
        """Read the JSON object that the command line gives as a text."""
        return json.loads(value) if isinstance(value, str) else value


class ReplicaApi:
    """The application that Serve knows before any replica exists. It passes requests on to that of its replica."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "lifespan":
            replica: Any = serve.get_replica_context().servable_object
            await replica.api(scope, receive, send)
            return
        for event in ("startup", "shutdown"):
            await receive()
            await send({"type": f"lifespan.{event}.complete"})


@serve.deployment(name="shoal")
@serve.ingress(ReplicaApi())
class ShoalReplica:
    """A server with an engine. Serve calls everything here on one event loop, as an `AsyncLLM` needs it."""

    api: ASGIApp
    _llm: AsyncLLM | None = None
    _exporting: asyncio.Task[None] | None = None

    async def __init__(self, arguments: Arguments) -> None:  # type: ignore[misc]  # Serve awaits it
        """Start the engine, and wait until it is ready: Serve sends requests only then.

        Raises:
            UserError, EngineError: it cannot start. Serve tries again a few times, and then shows the error.
        """
        configure_logging()
        settings = ServerSettings(**arguments.server)
        options = {
            **from_environment(online=True),
            "device": arguments.device,
            "tensor_parallel_size": arguments.tensor_parallel_size,
            "pipeline_parallel_size": arguments.pipeline_parallel_size,
            "distributed_executor_backend": "ray",
            **arguments.engine,
        }
        # A model may have to be downloaded first, and the event loop must stay free meanwhile.
        model = await asyncio.to_thread(open_model, arguments.model, options, online=True)
        self._llm = await asyncio.to_thread(start_llm, model, settings)
        try:
            await self._llm.ready()
            self.api = make_app(self._llm, settings)
            self._exporting = asyncio.create_task(export_to_ray(self._llm, settings.name_of(model)))
        except BaseException:
            await self._close()
            raise

    async def check_health(self) -> None:
        """Check that the engine can go on. Ray Serve replaces this replica if it cannot.

        Raises:
            EngineError: it has failed for good, or does not answer.
        """
        assert self._llm is not None
        status = await self._llm.status()
        if status.failure:
            raise EngineError(status.failure)

    async def __del__(self) -> None:
        """End the engine. Serve calls this when all requests have ended, or after `shutdown_timeout`."""
        await self._close()

    async def _close(self) -> None:
        if self._exporting is not None:
            self._exporting.cancel()
        if self._llm is not None:
            await asyncio.to_thread(self._llm.close)


def build(arguments: Arguments) -> Application:
    """Return the application for a model."""
    if arguments.device == "auto":
        has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
        arguments = arguments.model_copy(update={"device": "cuda" if has_gpus else "cpu"})
    ranks = {"GPU" if arguments.device == "cuda" else "CPU": float(arguments.tensor_parallel_size)}
    deployment: Deployment = ShoalReplica.options(  # type: ignore[attr-defined]
        ray_actor_options={"num_cpus": 1},
        placement_group_bundles=[{"CPU": 1.0}, *[ranks] * arguments.pipeline_parallel_size],
        max_ongoing_requests=arguments.max_ongoing_requests,
        autoscaling_config={
            "min_replicas": arguments.min_replicas,
            "max_replicas": max(arguments.min_replicas, arguments.max_replicas),
            "target_ongoing_requests": arguments.target_ongoing_requests,
            "upscale_delay_s": arguments.upscale_delay_s,
            "downscale_delay_s": arguments.downscale_delay_s,
        },
        graceful_shutdown_timeout_s=arguments.shutdown_timeout,
    )
    return deployment.bind(arguments)


app = build(Arguments())
