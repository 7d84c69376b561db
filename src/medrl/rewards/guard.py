"""A reward under guard: whatever a user's function does wrong stops the run with the sample named."""

import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from numbers import Real
from pathlib import Path
from typing import Any

from medrl.errors import MedrlError, NonFiniteError, RewardError
from medrl.rewards.kinds import read_answer
from medrl.types import Completion, Example, Score

LIMIT_S = 30.0
"""Longest that one call of a reward may take, unless its ``limit_s`` says otherwise."""
_SHOWN_CHARS = 200


class GuardedReward:
    """A reward that raises only typed errors; make one with `guarded`."""

    def __init__(self, reward: Callable[[Example, Completion], Any], limit_s: float) -> None:
        self.reward = reward
        self.limit_s = limit_s
        self.name = getattr(reward, "__name__", type(reward).__name__)

    def highest_of(self, example: Example) -> float | None:
        """What a right answer earns where the reward states it; None where it does not."""
        stated = getattr(self.reward, "highest_of", None)
        return None if stated is None else stated(example)

    def __call__(self, example: Example, completion: Completion) -> Score:
        sample = _describe(self.name, example, completion)
        with renaming_errors(f"{sample} raised", RewardError), _time_limit(self.limit_s, sample):
            result = self.reward(example, completion)
        if getattr(result, "ndim", None) == 0:
            result = result.item()  # one number of numpy or torch
        if isinstance(result, Real):
            value = float(result)  # True is 1 and False is 0
            result = Score(value=value, parts={self.name: value}, explanation=f"{self.name} {value:g}.")
        if not isinstance(result, Score) or not isinstance(result.value, Real):
            count = f", {len(result)} values" if isinstance(result, list | tuple) else ""
            raise RewardError(
                f"{sample} returned {result!r:.80} (a {type(result).__name__}{count}); it must return one number, or a "
                "Score. A function over lists, as other trainers call them, goes through medrl.rewards.adapters"
            )
        if not math.isfinite(result.value):
            raise NonFiniteError(f"{sample} returned {result.value}; a reward must be a finite number")
        return result if result.answer is not None else _with_answer(result, example, completion)


def guarded(reward: Callable[[Example, Completion], Any], limit_s: float | None = None) -> GuardedReward:
    """``reward`` so that it gives a `Score` or raises a typed error that names function, example and completion.

    A number is taken as the value of a score, True as 1 and False as 0. `RewardError`: it raised, returned anything
    else, or took longer than ``limit_s`` seconds (default: its own ``limit_s``, else `LIMIT_S`). `NonFiniteError`: NaN
    or infinity. The limit
    works by an alarm, so it holds in the main thread of a program on Linux and macOS, where training runs.
    """
    if isinstance(reward, GuardedReward):
        return reward
    return GuardedReward(reward, limit_s or getattr(reward, "limit_s", LIMIT_S))


def _with_answer(score: Score, example: Example, completion: Completion) -> Score:
    answer = read_answer(example, completion).value
    return Score(value=score.value, parts=score.parts, answer=answer, explanation=score.explanation)


def _describe(name: str, example: Example, completion: Completion) -> str:
    text = completion.text if len(completion.text) <= _SHOWN_CHARS else f"{completion.text[:_SHOWN_CHARS]}..."
    return f"reward {name} on example {example.id!r} (completion {text!r})"


class renaming_errors:
    """Any error of the block is raised again as a ``kind`` whose message begins with ``what`` and ends with the line it
    came from; our own errors pass."""

    def __init__(self, what: str, kind: type[MedrlError]) -> None:
        self.what = what
        self.kind = kind

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, MedrlError):
            *_, (frame, line) = traceback.walk_tb(error.__traceback__)
            # A syntax error says itself where it is; the frame that met it is Python's own.
            where = "" if isinstance(error, SyntaxError) else f" ({Path(frame.f_code.co_filename).name}, line {line})"
            raise self.kind(f"{self.what} {type(error).__name__}: {error}{where}") from error


class _TooLate(BaseException):
    """Not an `Exception`, so that a reward's own ``except Exception`` does not swallow the alarm."""


@contextmanager
def _time_limit(limit_s: float, sample: str) -> Iterator[None]:
    """Stop the block after ``limit_s`` seconds by SIGALRM; an alarm that was running is set again afterwards."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise _TooLate

    started = time.monotonic()
    handler = signal.signal(signal.SIGALRM, stop)
    remaining, interval = signal.setitimer(signal.ITIMER_REAL, limit_s)
    try:
        yield
    except _TooLate:
        raise RewardError(f"{sample} took longer than {limit_s:g} s; make it faster, or give it a limit_s") from None
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if remaining:
            signal.setitimer(signal.ITIMER_REAL, max(1e-3, remaining - (time.monotonic() - started)), interval)
