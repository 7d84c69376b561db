"""Seconds of each phase of a step: every piece of work says what it is, and whoever wants to know listens.

with timing() as seconds:        # nested phases are taken out of those around them
    train_one_step()
seconds["vision"], seconds["prefill"], seconds["decode"], ...
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_CLOCK: "ContextVar[_Clock | None]" = ContextVar("clock", default=None)


class _Clock:
    """Gives each second to the innermost phase."""

    def __init__(self, exact: bool) -> None:
        self.seconds: dict[str, float] = {}
        self.open: list[str] = []
        self.exact = exact
        self.since = self._now()

    def change(self) -> None:
        now = self._now()
        if self.open:
            name = self.open[-1]
            self.seconds[name] = self.seconds.get(name, 0.0) + now - self.since
        self.since = now

    def _now(self) -> float:
        if self.exact:
            import torch  # the rooms that need no torch also import this module

            if torch.cuda.is_available():
                torch.cuda.synchronize()
        return time.perf_counter()


@contextmanager
def timing(*, exact: bool = False) -> Iterator[dict[str, float]]:
    """Collect the seconds of all phases inside. ``exact`` waits for the GPU at each border, which costs a little."""
    clock = _Clock(exact)
    token = _CLOCK.set(clock)
    try:
        yield clock.seconds
    finally:
        _CLOCK.reset(token)


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say that what follows is ``name``; costs nothing when nobody listens."""
    clock = _CLOCK.get()
    if clock is None:
        yield
        return
    clock.change()
    clock.open.append(name)
    try:
        yield
    finally:
        clock.change()
        clock.open.pop()
