"""The state of a client whose engine may fail or be closed."""

from shoal.errors import ClosedError, EngineError


class FailureState:
    """A base class of clients: a failure is raised once, and later calls are refused with its reason."""

    _failure: EngineError | None = None
    _failure_raised = False
    _closed = False

    def _check_open(self) -> None:
        """Check that the engine can still be used.

        Raises:
            EngineError: it has failed, and this is the first call since then.
            ClosedError: it has failed before, or was closed.
        """
        if self._failure is not None and not self._failure_raised:
            self._failure_raised = True
            raise self._failure
        if self._failure is not None:
            raise ClosedError(f"the engine has failed: {self._failure}")
        if self._closed:
            raise ClosedError("the engine was closed")
