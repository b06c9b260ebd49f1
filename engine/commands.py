"""What other threads ask of a running loop: done by the loop between two leases, answered by Futures.

Every Future gets its answer: the result, what was raised, or, once the run is over, that it is. It knows nothing of what is
asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from threading import Lock


class RunOver(ValueError):
    """Nobody is left to do what was asked."""


class Commands:
    """Waiting commands of one run, first come first done."""

    def __init__(self):
        self._waiting: deque[tuple[Callable[[], object], Future]] = deque()
        self._lock = Lock()
        self._over = False

    def __bool__(self) -> bool:
        """True if one waits."""
        return bool(self._waiting)

    def ask(self, act: Callable[[], object]) -> Future:
        """From any thread: have `act` called soon. The Future holds what it returns or raises."""
        answer: Future = Future()
        with self._lock:
            if not self._over:
                self._waiting.append((act, answer))
                return answer
        answer.set_exception(RunOver("the run is over; start an engine anew"))
        return answer

    def do(self) -> None:
        """From the loop: all that wait. One that fails must have changed nothing; the loop goes on."""
        while self._waiting:
            act, answer = self._waiting.popleft()
            if not answer.set_running_or_notify_cancel():
                continue
            try:
                done = act()
            except Exception as error:  # whatever it is, it belongs to whoever asked
                answer.set_exception(error)
            else:
                answer.set_result(done)

    def end(self) -> None:
        """From the loop, which does nothing more: those that wait, and all that come, are told so."""
        with self._lock:
            self._over = True
        while self._waiting:
            answer = self._waiting.popleft()[1]
            if answer.set_running_or_notify_cancel():
                answer.set_exception(RunOver("the run ended before this was done; start an engine anew"))
