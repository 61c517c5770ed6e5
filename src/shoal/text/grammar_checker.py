"""Checking the grammar of a request before the request runs."""

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress

from shoal.errors import ClosedError, EngineError, QueueFull, RequestError
from shoal.process.forks import Owner
from shoal.structured.pool import GrammarPool
from shoal.text.prompts import Job
from shoal.transport.waker import Waker
from shoal.wire.grammars import Verdict

_IDLE_S = 3600.0  # length of one wait for verdicts, which is then repeated
_MAX_WAITING = 256  # grammars that wait to be checked
_MAX_KNOWN = 1024  # grammars that are remembered as valid
_END_S = 5.0  # time for the thread to end


class GrammarChecker:
    """Checks grammars by compiling them in the processes of a pool, a few at a time. For use from any thread.

    Args:
        make_pool: makes the pool; called when the first grammar comes.
    """

    def __init__(self, make_pool: Callable[[], GrammarPool]) -> None:
        self._owner = Owner("grammar checker")
        self._make_pool = make_pool
        self._lock = threading.Lock()
        self._submitted: list[tuple[str, Future[None]]] = []
        self._waiting: dict[int, tuple[str, Future[None]]] = {}
        self._known: OrderedDict[bytes, None] = OrderedDict()  # digests of valid grammars
        self._waker: Waker | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def check(self, grammar: str) -> None:
        """Check a grammar in llguidance's form, and wait for the outcome.

        Raises:
            RequestError: the text is not a grammar, no text satisfies it, it uses an unsupported feature, or it takes
                too much time or memory to compile.
            EngineError: too many grammars wait to be checked, or this checker is closed.
        """
        self.submit(grammar).result()

    def submit(self, grammar: str) -> "Future[None]":
        """Begin to check a grammar, and return a future that ends like `check`.

        Cancelling the future stops the compilation, unless another request waits for the same grammar.
        """
        self._owner.check()
        future: Future[None] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(ClosedError("the engine was closed"))
            elif _digest(grammar) in self._known:
                future.set_result(None)
            elif len(self._submitted) + len(self._waiting) >= _MAX_WAITING:
                future.set_exception(QueueFull(f"{_MAX_WAITING} grammars already wait to be compiled; try again later"))
            else:
                self._submitted.append((grammar, future))
                self._wake()
        future.add_done_callback(self._on_done)
        return future

    def check_jobs(self, jobs: Iterable[Job]) -> None:
        """Check the grammars of all jobs.

        Raises:
            RequestError: a grammar can't be used; the message names its prompt.
            EngineError: as in `check`.
        """
        firsts = {job.grammar: job.index for job in reversed(list(jobs)) if job.grammar}
        for grammar, index in firsts.items():
            try:
                self.check(grammar)
            except RequestError as error:
                raise error.within(f"prompt {index}") from None

    def close(self) -> None:
        """Stop all compilations. Later calls do nothing."""
        if not self._owner.is_here:  # this is a forked child, which does not have the thread
            return
        with self._lock:
            self._closed = True
            thread = self._thread
            if self._waker is not None:
                self._waker.wake()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_END_S)

    def _wake(self) -> None:
        if self._thread is None:
            self._waker = Waker()
            self._thread = threading.Thread(target=self._run, args=(self._waker,), daemon=True, name="shoal-grammars")
            self._thread.start()
        assert self._waker is not None
        self._waker.wake()

    def _on_done(self, future: "Future[None]") -> None:
        if future.cancelled():
            with self._lock:
                if self._waker is not None:
                    self._waker.wake()

    # --- on the checker's own thread -----------------------------------------------------------------------------

    def _run(self, waker: Waker) -> None:
        pool = self._make_pool()
        number = 0
        try:
            while True:
                waker.clear()
                if self._closed:  # checked after `quiet`, else the wake-up of `close` could be lost
                    return
                with self._lock:
                    new, self._submitted = self._submitted, []
                    for grammar, future in new:
                        number += 1
                        self._waiting[number] = (grammar, future)
                for seq in range(number - len(new) + 1, number + 1):
                    pool.follow(seq, self._waiting[seq][0])
                self._drop_cancelled(pool)
                for verdict in pool.poll(_IDLE_S, [waker]):
                    self._deliver_outcome(verdict, pool)
        finally:
            pool.close()
            waker.close()
            with self._lock:
                self._closed = True
                left = [future for _, future in (*self._submitted, *self._waiting.values())]
            for future in left:
                with suppress(InvalidStateError):
                    future.set_exception(ClosedError("the engine was closed"))

    def _drop_cancelled(self, pool: GrammarPool) -> None:
        gone = [seq for seq, (_, future) in self._waiting.items() if future.cancelled()]
        pool.forget(gone)
        with self._lock:
            for seq in gone:
                del self._waiting[seq]

    def _deliver_outcome(self, verdict: Verdict, pool: GrammarPool) -> None:
        if verdict.seq not in self._waiting:
            return
        with self._lock:
            grammar, future = self._waiting.pop(verdict.seq)
            if verdict.refusal is None and not verdict.lost:
                self._known[_digest(grammar)] = None
                while len(self._known) > _MAX_KNOWN:
                    self._known.popitem(last=False)
        pool.forget((verdict.seq,))
        with suppress(InvalidStateError):  # it was cancelled
            if verdict.refusal is not None:
                future.set_exception(verdict.refusal.error())
            elif verdict.lost:
                future.set_exception(EngineError(f"structured_outputs: {verdict.lost}; send the request again"))
            else:
                future.set_result(None)


def _digest(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode(), digest_size=16).digest()
