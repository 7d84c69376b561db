"""Many requests at a time: replies as they come, an end that loses none, and a stop that waits for none."""

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from typing import TypeVar

from medrl import stopping
from medrl.errors import EndpointError

LOOK_UP_EVERY_S = 0.2
"""Seconds between checks for a stop request while waiting for replies."""

A = TypeVar("A")
T = TypeVar("T")


@dataclass(slots=True)
class Work:
    """What the requests of one call know of each other."""

    answered: int = 0
    away: bool = False
    """True once a connection was refused: a server that answers later has been restarted."""
    leaving: threading.Event = field(default_factory=threading.Event)
    """Set once the call ends early: attempts that run are finished, no other is made."""


def each(items: Iterable[A], work_on: Callable[[A], T], work: Work, *, at_once: int) -> Iterator[T]:
    """What ``work_on`` returns for each item, as it is ready, ``at_once`` of them under way in threads.

    After an ``EndpointError`` no other is begun, those under way are handed over, then it is raised. Asked to stop, it
    leaves at once.
    """
    waiting, failure = iter(items), None
    under_way: set[Future[T]] = set()
    try:
        while True:
            while failure is None and len(under_way) < at_once and (item := next(waiting, None)) is not None:
                under_way.add(_begin(work_on, item))
            if not under_way:
                break
            ready, under_way = wait(under_way, timeout=LOOK_UP_EVERY_S, return_when=FIRST_COMPLETED)
            for future in ready:
                if (error := future.exception()) is None:
                    yield future.result()
                elif not isinstance(error, EndpointError):
                    raise error
                elif failure is None:
                    failure = error
                    work.leaving.set()
            stopping.check()
    finally:
        work.leaving.set()
    if failure is not None:
        raise failure


class _Outcome(Future[T]):
    """As a context it keeps whatever its block raises for the one who waits."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        if error is not None:
            self.set_exception(error)
        return True


def _begin(work_on: Callable[[A], T], item: A) -> Future[T]:
    """Not a pool of concurrent.futures: Python waits for its threads when it ends, also for one that hangs."""
    outcome: _Outcome[T] = _Outcome()

    def run() -> None:
        with outcome:
            outcome.set_result(work_on(item))

    threading.Thread(target=run, name="medrl-request", daemon=True).start()
    return outcome
