"""Being asked to stop: SIGTERM and Ctrl-C wait for the next safe point of long work, where all of it can be saved.

with stopping.at_safe_points():
    ...
    stopping.check()      # a safe point
"""

import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGINT)
_asked = False  # signals belong to the process, and so does this


class Stopped(KeyboardInterrupt):
    """Work that ended early because it was asked to. A KeyboardInterrupt, so that nothing takes it for a failure."""


def check() -> None:
    """A safe point: raises ``Stopped`` when the process was asked to stop."""
    if _asked:
        raise Stopped


@contextmanager
def at_safe_points() -> Iterator[None]:
    """Within, the first signal only asks: the next ``check`` stops. A second one acts as it does outside, at once.

    Signals that are ignored stay ignored. In other threads than the main one, where Python takes no handlers, signals
    act as always.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
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


def _restore(handlers: Mapping[signal.Signals, Any]) -> None:
    for number, handler in handlers.items():
        signal.signal(number, handler)
