"""The next step's images are decoded, resized and tokenized while this step computes."""

import copy
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any

from medrl.data.sampler import Sampler
from medrl.errors import DataError
from medrl.rollout.collect import Ask
from medrl.training import distributed
from medrl.training.scorer import Scorer
from medrl.types import Example, Prompt

LIMIT_S = 300.0
"""Longest wait for one prompt's images: a disk that hangs ends the run instead of holding it for ever."""
GRACE_S = 2.0
"""Seconds a thread may take to finish at the end; one that hangs is left behind."""


class Ahead:
    """Threads that prepare prompts into the policy's memory; decoding and resizing let go of Python's lock.

    with Ahead(policy) as ahead:
        ahead.start(prompts)      # returns at once
        ahead.wait()              # what is still missing is waited for
    """

    def __init__(self, policy: Scorer, workers: int = 4, limit_s: float = LIMIT_S) -> None:
        self.policy = policy
        self.limit_s = limit_s
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        # Not concurrent.futures: Python waits for its threads when it ends, also for one that hangs.
        self._threads = [
            threading.Thread(target=self._work, name=f"medrl-data-{number}", daemon=True) for number in range(workers)
        ]
        self._under_way: list[_Task] = []

    def start(self, prompts: Sequence[Prompt]) -> None:
        """Begin with these prompts."""
        self._under_way = [_Task(prompt) for prompt in prompts]
        for task in self._under_way:
            self._tasks.put(task)

    def wait(self) -> None:
        """Until the prompts given last are ready.

        Raises what preparing one raised, e.g. ``ImageError``; ``DataError`` naming a prompt that takes too long. No
        prompt is ever left out.
        """
        under_way, self._under_way = self._under_way, []
        for task in under_way:
            if not task.done.wait(self.limit_s):
                images = ", ".join(map(str, task.prompt.images)) or "none"
                raise DataError(
                    f"example {task.prompt.id} is not ready after {self.limit_s:g} s (images: {images}): does the disk "
                    "or network they lie on still answer? What was saved is whole; continue when it does"
                )
            if task.error is not None:
                raise task.error

    def _work(self) -> None:
        # A tokenizer that two threads use at once fails, and the main one decodes completions meanwhile.
        encoder: Any = None
        while (task := self._tasks.get()) is not None:
            with task:
                encoder = encoder or copy.deepcopy(self.policy.encoder)
                self.policy.prepare(task.prompt, encoder)

    def __enter__(self) -> "Ahead":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(queue.Empty):
            while True:  # what nobody waits for any more
                self._tasks.get_nowait()
        for _ in self._threads:
            self._tasks.put(None)
        ends = time.monotonic() + GRACE_S
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))


class _Task:
    """A prompt to prepare. As a context it keeps whatever its block raises for the one who waits."""

    def __init__(self, prompt: Prompt) -> None:
        self.prompt = prompt
        self.error: BaseException | None = None
        self.done = threading.Event()

    def __enter__(self) -> None:
        pass

    def __exit__(self, _: object, error: BaseException | None, __: object) -> bool:
        self.error = error
        self.done.set()
        return True


def make_foresight(
    train_set: Sequence[Example], sampler: Sampler, ask: Ask, count: int
) -> Callable[[int], list[Prompt]]:
    """A function of n: this rank's share of the ``count`` prompts that come after the next n steps. Nothing is drawn.

    Where a step draws more than ``count``, to replace what teaches nothing, these are the first it takes.
    """
    return lambda steps: [ask(train_set[index]) for index in distributed.share(sampler.peek(count, skip=steps * count))]
