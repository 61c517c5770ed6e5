"""The model behind the endpoints of `make_app`, for `shoal serve` and for programs with an HTTP server of their own."""

from shoal.launch.open_model import OpenModel
from shoal.llm.async_llm import AsyncLLM
from shoal.server.api.responses.response_store import ResponseStore
from shoal.server.operations.request_metrics import RequestMetrics
from shoal.server.settings import ServerSettings


def start_llm(model: OpenModel, settings: ServerSettings, metrics: RequestMetrics | None = None) -> AsyncLLM:
    """Start the replicas of a model with everything that the endpoints ask for: metrics and stored responses.

    Args:
        metrics: counts the requests; None: new ones.

    Raises:
        UserError: options and host do not fit together; nothing was started.
    """
    metrics = metrics or RequestMetrics(model.served.max_model_len)
    return AsyncLLM(model, recorder=metrics, verbs=metrics.verbs | ResponseStore.of(settings).verbs)
