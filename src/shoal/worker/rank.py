"""The interface of a rank for executors: it takes messages and returns messages, and its errors are messages too."""

import traceback

from shoal.errors import CommError, ShoalError, UserError
from shoal.log import get_logger
from shoal.wire.ranks import FromRank, RankCall, RankReport, RankSetup, StepMask, StepPlan
from shoal.worker.memory_errors import explain_out_of_memory
from shoal.worker.worker import Connect, Worker

log = get_logger("worker")


class Rank:
    """A rank. Its first message must be a RankSetup. After an error it takes no more work until the next RankSetup."""

    def __init__(self, connect: Connect) -> None:
        self._connect = connect
        self._worker: Worker | None = None
        self._rank = -1
        self._setup: RankSetup | None = None
        self._failed = False

    @property
    def last_step(self) -> int:
        """The number of the last step that it has finished; -1 before the first."""
        return self._worker.last_step if self._worker else -1

    @property
    def doing(self) -> str:
        """The current activity of the rank, for error messages."""
        return self._worker.doing if self._worker else "starting"

    @property
    def position(self) -> tuple[object, ...]:
        """Something that changes with everything that the rank does; (): it has nothing to do."""
        return self._worker.position if self._worker else ()

    @property
    def waits(self) -> bool:
        """True if the rank is in an operation with other ranks."""
        return self._worker is not None and self._worker.waits

    def answer(self, message: RankSetup | StepPlan | StepMask | RankCall) -> FromRank | None:
        """Handle a message, and return the answer to it, if there is one. Never raises."""
        if isinstance(message, RankSetup):
            self._failed = False
        if self._failed:
            return None
        try:
            if isinstance(message, RankSetup):
                self._rank, self._setup = message.rank, message
                if self._worker is None:
                    self._worker = Worker(message, self._connect)
                else:
                    self._worker.rejoin(message)
                return None
            if self._worker is None:
                raise ShoalError("a message came before the rank's setup")
            return self._worker.handle(message)
        except Exception as error:  # noqa: BLE001 - the engine must learn of every error, and decides what follows
            self._failed = True
            if not isinstance(error, UserError | CommError):
                log.error("rank %d failed:\n%s", self._rank, traceback.format_exc())
            if self._worker is not None:
                self._worker.abort()
            return RankReport(
                rank=self._rank,
                step=self.last_step,
                error=(self._setup and explain_out_of_memory(error, self._setup)) or _in_one_line(error),
                user_error=isinstance(error, UserError),
                communication=isinstance(error, CommError),
                incarnation=self._setup.incarnation if self._setup is not None else 0,
            )


def _in_one_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    text = lines[0] if lines else "no message"
    return text if isinstance(error, ShoalError) else f"{type(error).__name__}: {text}"
