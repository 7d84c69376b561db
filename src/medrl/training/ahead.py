"""The next step's images are decoded, resized and tokenized while this step computes."""

import copy
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any

from medrl.training.scorer import Scorer
from medrl.types import Prompt

WORKERS = 4


class Ahead:
    """Threads that prepare prompts into the policy's memory; decoding and resizing let go of Python's lock.

    with Ahead(policy) as ahead:
        ahead.start(prompts)      # returns at once
        ahead.wait()              # what is still missing is waited for
    """

    def __init__(self, policy: Scorer, workers: int = WORKERS) -> None:
        self.policy = policy
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="medrl-data")
        self._own = threading.local()
        self._under_way: list[Future[None]] = []

    def start(self, prompts: Sequence[Prompt]) -> None:
        """Begin with these prompts."""
        self._under_way = [self._threads.submit(self._prepare, prompt) for prompt in prompts]

    def wait(self) -> None:
        """Until the prompts given last are ready. Raises what preparing one raised, e.g. ``ImageError``."""
        under_way, self._under_way = self._under_way, []
        for prompt in under_way:
            prompt.result()

    def _prepare(self, prompt: Prompt) -> None:
        self.policy.prepare(prompt, self._processor())

    def _processor(self) -> Any:
        # A tokenizer that two threads use at once fails, and the main one decodes completions meanwhile.
        if not hasattr(self._own, "processor"):
            self._own.processor = copy.deepcopy(self.policy.processor)
        return self._own.processor

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._threads.shutdown(cancel_futures=True)
