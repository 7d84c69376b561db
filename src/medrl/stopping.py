"""Being asked to stop, by a signal or because time is up: long work goes on to its next safe point and saves there.

with stopping.at_safe_points():
    ...
    stopping.check()      # a safe point
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
"""A cluster that preempts, a person, and a cluster that warns before it ends a job (Slurm's ``--signal=USR1@60``)."""
_asked = False  # signals belong to the process, and so does this
_deadline: "Deadline | None" = None


class Stopped(KeyboardInterrupt):
    """Work that ended early because it was asked to. A KeyboardInterrupt, so that nothing takes it for a failure.

    Its text, where it has one, says why.
    """


class Deadline:
    """A time by which work must have been saved.

    Near when less time is left than the longest interval between safe points plus twice the longest save.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.save_s = 0.0
        """Longest save so far, or a guess at the first one."""
        self._clock = clock
        self._ends = clock() + seconds
        self._last: float | None = None
        self._longest = 0.0

    def saved(self, seconds: float) -> None:
        """A save took this long. What happened meanwhile was not the way to a safe point."""
        self.save_s = max(self.save_s, seconds)
        self._last = None

    def is_near(self) -> bool:
        """Whether to stop at this safe point: there may be no time for another."""
        now = self._clock()
        if self._last is not None:
            self._longest = max(self._longest, now - self._last)
        self._last = now
        return now + self._longest + 2 * self.save_s > self._ends


def check() -> None:
    """A safe point: raises ``Stopped`` when the process was asked to stop, or its time is nearly up."""
    if _asked:
        raise Stopped
    if _deadline is not None and _deadline.is_near():
        raise Stopped("time is nearly up")


@contextmanager
def at_safe_points(deadline: Deadline | None = None) -> Iterator[None]:
    """Within, the first signal only asks: the next ``check`` stops. A second one acts as it does outside, at once.

    Signals that are ignored stay ignored. In other threads than the main one, where Python takes no handlers, signals
    act as always.
    """
    _set_deadline(deadline)
    try:
        if threading.current_thread() is threading.main_thread():
            with _asking():
                yield
        else:
            yield
    finally:
        _set_deadline(None)


@contextmanager
def tidily() -> Iterator[None]:
    """Within, SIGTERM ends the process through its ``finally`` clauses, so that nothing half made is left behind.

    For work that has nothing to save. Whoever has a handler already, or ignores the signal, keeps to that.
    """
    alone = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL

    def leave(*_: object) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    if alone:
        signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        if alone:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextmanager
def _asking() -> Iterator[None]:
    handlers = {number: signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    handlers = {number: handler for number, handler in handlers.items() if handler != signal.SIG_IGN}

    def ask(*_: object) -> None:
        _set_asked(True)
        _restore(handlers)
        # Not print: the signal may have come in the middle of one, and a stream cannot be entered twice.
        os.write(2, b"\nasked to stop: finishing what is under way and saving; once more leaves at once\n")

    for number in handlers:
        signal.signal(number, ask)
    try:
        yield
    finally:
        _restore(handlers)
        _set_asked(False)


def _set_asked(asked: bool) -> None:
    global _asked
    _asked = asked


def _set_deadline(deadline: Deadline | None) -> None:
    global _deadline
    _deadline = deadline


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
