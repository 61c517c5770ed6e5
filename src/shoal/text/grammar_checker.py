"""Finds out before a request runs whether its grammar can be obeyed."""

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

_IDLE_S = 3600.0
_MOST_WAITING = 256
_MOST_KNOWN = 1024
_END_S = 5.0


class GrammarChecker:
    """Has grammars compiled, one after the other or a few at a time, where that harms nobody. For any thread.

    Args:
        make_pool: makes where they are compiled, when the first one comes.
    """

    def __init__(self, make_pool: Callable[[], GrammarPool]) -> None:
        self._owner = Owner("grammar checker")
        self._make_pool = make_pool
        self._lock = threading.Lock()
        self._new: list[tuple[str, Future[None]]] = []
        self._waiting: dict[int, tuple[str, Future[None]]] = {}
        self._known: OrderedDict[bytes, None] = OrderedDict()  # digests of grammars that can be obeyed
        self._waker: Waker | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def check(self, grammar: str) -> None:
        """Waits until it is known.

        Raises:
            RequestError: it is no grammar, no text satisfies it, it uses what is not supported, or it takes too much
                time or memory to compile.
            EngineError: too many wait for that already, or this was closed.
        """
        self.submit(grammar).result()

    def submit(self, grammar: str) -> "Future[None]":
        """The outcome of `check`. Cancelled, it ends the compilation, unless somebody else waits for it too."""
        self._owner.check()
        future: Future[None] = Future()
        with self._lock:
            if self._closed:
                future.set_exception(ClosedError("the engine was closed"))
            elif _digest(grammar) in self._known:
                future.set_result(None)
            elif len(self._new) + len(self._waiting) >= _MOST_WAITING:
                future.set_exception(QueueFull(f"{_MOST_WAITING} grammars wait to be compiled already; come again"))
            else:
                self._new.append((grammar, future))
                self._wake()
        future.add_done_callback(self._on_done)
        return future

    def check_jobs(self, jobs: Iterable[Job]) -> None:
        """
        Raises:
            RequestError: the grammar of one of them can't be obeyed; its prompt is named.
            EngineError: as `check`.
        """
        firsts = {job.grammar: job.index for job in reversed(list(jobs)) if job.grammar}
        for grammar, index in firsts.items():
            try:
                self.check(grammar)
            except RequestError as error:
                raise RequestError(f"prompt {index}: {error}") from None

    def close(self) -> None:
        """Ends what is compiled. Idempotent."""
        if not self._owner.is_here:  # its thread is not in this process
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
            self._thread = threading.Thread(target=self._drive, args=(self._waker,), daemon=True, name="shoal-grammars")
            self._thread.start()
        assert self._waker is not None
        self._waker.wake()

    def _on_done(self, future: "Future[None]") -> None:
        if future.cancelled():
            with self._lock:
                if self._waker is not None:
                    self._waker.wake()

    # --- on the thread -------------------------------------------------------------------------------------------

    def _drive(self, waker: Waker) -> None:
        pool = self._make_pool()
        number = 0
        try:
            while True:
                waker.quiet()
                if self._closed:  # looked at behind `quiet`, or its wake could be missed
                    return
                with self._lock:
                    new, self._new = self._new, []
                    for grammar, future in new:
                        number += 1
                        self._waiting[number] = (grammar, future)
                for seq in range(number - len(new) + 1, number + 1):
                    pool.follow(seq, self._waiting[seq][0])
                self._drop_cancelled(pool)
                for verdict in pool.poll(_IDLE_S, [waker]):
                    self._settle(verdict, pool)
        finally:
            pool.close()
            waker.close()
            with self._lock:
                self._closed = True
                left = [future for _, future in (*self._new, *self._waiting.values())]
            for future in left:
                with suppress(InvalidStateError):
                    future.set_exception(ClosedError("the engine was closed"))

    def _drop_cancelled(self, pool: GrammarPool) -> None:
        gone = [seq for seq, (_, future) in self._waiting.items() if future.cancelled()]
        pool.forget(gone)
        with self._lock:
            for seq in gone:
                del self._waiting[seq]

    def _settle(self, verdict: Verdict, pool: GrammarPool) -> None:
        if verdict.seq not in self._waiting:
            return
        with self._lock:
            grammar, future = self._waiting.pop(verdict.seq)
            if not (verdict.refused or verdict.lost):
                self._known[_digest(grammar)] = None
                while len(self._known) > _MOST_KNOWN:
                    self._known.popitem(last=False)
        pool.forget((verdict.seq,))
        with suppress(InvalidStateError):  # it was cancelled
            if verdict.refused:
                future.set_exception(RequestError(verdict.refused))
            elif verdict.lost:
                future.set_exception(EngineError(f"structured_outputs: {verdict.lost}; send it again"))
            else:
                future.set_result(None)


def _digest(grammar: str) -> bytes:
    return hashlib.blake2b(grammar.encode(), digest_size=16).digest()
