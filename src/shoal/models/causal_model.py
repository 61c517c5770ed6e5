"""The interface of a rank's stage of a model, for all implementations of models."""

from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar

from torch import Tensor

from shoal.kernels.base import KVCache, PagedBatch
from shoal.kernels.top_outputs import TopOutputs

T = TypeVar("T")


class LayerWatch(Protocol):
    """Is told when each layer of a stage begins and ends, for a trace."""

    def began(self) -> None: ...

    def ended(self, layer: int) -> None:
        """`layer`: the number of the layer within the stage."""


def watched(layers: Iterable[T], watch: LayerWatch) -> Iterator[T]:
    """Yield the layers one by one. A layer begins when it is given out, and ends when the next one is asked for."""
    for number, layer in enumerate(layers):
        watch.began()
        yield layer
        watch.ended(number)


class CausalModel(Protocol):
    """A pipeline stage of a causal language model, on one rank."""

    def hidden(self, inputs: Tensor, batch: PagedBatch, caches: list[KVCache], rows: Tensor | None) -> Tensor:
        """Compute the layers of this stage for one step, and store keys and values in the caches.

        Args:
            inputs: on the first stage the tokens, int64 [n]; on others the residual stream [n, hidden] of the stage
                before.
            caches: one for each layer of the stage.
            rows: int64 [m], the tokens whose result is wanted on the last stage; None for all.

        Returns:
            On the last stage the input of `logits`, [m, width]; on others the residual stream [n, hidden].
        """

    def watch_layers(self, watch: LayerWatch | None) -> None:
        """Tell `watch` of each layer from now on; None: nobody."""

    def join(self) -> None:
        """Take part, without tokens, in the exchange between replicas that share experts, for one step."""

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits of this rank's share of the vocabulary: [m, rows of the head].

        They are float32, or of the model's dtype if nothing is done with the product of the head.

        Args:
            hidden: [m, width], from the last stage's `hidden`.

        Raises:
            EngineError: this is not the last stage.
        """

    def top_tokens(self, hidden: Tensor, start: int) -> TopOutputs | None:
        """Return the largest of each row's `logits` and its token, without writing all of them.

        Of equal logits, that with the lowest token is taken. None: they must be written.

        Args:
            start: the first token of this rank's share.
        """
