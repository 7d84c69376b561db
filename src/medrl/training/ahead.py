"""The next step's images are decoded, resized and tokenized while this step computes: by threads or by processes."""

import copy
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Literal

import torch
from threadpoolctl import threadpool_limits

from medrl.data.sampler import Sampler
from medrl.errors import DataError
from medrl.policy.encoding_process import EncodingProcess, StartError, close_all, save_processor
from medrl.rollout.collect import Ask
from medrl.training import distributed
from medrl.training.scorer import Scorer
from medrl.types import Example, Prompt

log = logging.getLogger(__name__)
Processes = Literal["auto"] | bool
LIMIT_S = 300.0
"""Longest wait for one prompt's images: a disk that hangs ends the run instead of holding it for ever."""
GRACE_S = 2.0
"""Seconds a thread may take to finish at the end; one that hangs is left behind."""


def choose_processes(wanted: Processes, workers: int, device: torch.device) -> Processes:
    """Whether processes prepare prompts, or threads; ``auto``: processes where they can be had. Logged.

    Half of what a small image costs holds Python's lock. On a GPU the main thread needs that for the next launch; on a
    CPU there is no core to spare, and a process costs a start of seconds and half a gigabyte.
    """
    if wanted is False or (wanted == "auto" and device.type != "cuda"):  # a choice among one is no news
        return False
    how = "chosen by auto" if wanted == "auto" else "as asked"
    log.info("images: %d processes of their own (%s on %s)", workers, how, device)
    return wanted


class Ahead:
    """Threads that prepare prompts into the policy's memory, by themselves or each by a process of its own.

    with Ahead(policy) as ahead:
        ahead.start(prompts)      # returns at once
        ahead.wait()              # what is still missing is waited for

    Decoding and resizing let go of Python's lock, and so does waiting for a process. Until its process has started, a
    thread prepares by itself: both give the same bits. Of a process that cannot be had, ``auto`` warns and leaves its
    work to the thread; where processes were asked for, that is an error.
    """

    def __init__(
        self, policy: Scorer, workers: int = 4, limit_s: float = LIMIT_S, *, processes: Processes = False
    ) -> None:
        self.policy = policy
        self.limit_s = limit_s
        self._workers = workers
        self._wanted = processes
        self._warned = self._ending = False
        self._warning = threading.Lock()
        self._processes: list[EncodingProcess] = []
        self._held = ExitStack()
        self._tasks: queue.SimpleQueue[_Task | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
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

    def wait_for_processes(self) -> None:
        """Until all have started, for who wants to know what they are worth; raises ``DataError`` as ``wait`` would."""
        for process in self._processes:
            self._is_ready(process, wait=True)

    def _work(self, process: EncodingProcess | None) -> None:
        # A tokenizer that two threads use at once fails, and the main one decodes completions meanwhile.
        encoder: Any = None
        # torch's operations in this thread stay in it. A second team of OpenMP threads, even an idle one, makes more of
        # them than there are cores, and GNU's then sleep after each operation of the main thread instead of waiting
        # awake: decoding on a CPU took 1.7 times as long.
        torch.get_num_threads()  # has torch choose a number for this thread, as it would at its first operation
        with threadpool_limits(1, user_api="openmp"):
            while (task := self._tasks.get()) is not None:
                with task:
                    if process is not None and self._is_ready(process):
                        self.policy.prepare(task.prompt, process)
                    else:
                        encoder = encoder or copy.deepcopy(self.policy.encoder)
                        self.policy.prepare(task.prompt, encoder)

    def _is_ready(self, process: EncodingProcess, *, wait: bool = False) -> bool:
        try:
            return process.ready(wait=wait)
        except StartError as error:
            self._do_without(error)
            return False

    def _do_without(self, error: StartError) -> None:
        """Leave it to threads, with one warning, unless processes were asked for."""
        if self._wanted != "auto":
            raise DataError(
                f"training.data_processes (in an evaluation, EvalSettings.data_processes) is true, but {error}. With "
                "auto or false, threads prepare prompts. What was saved is whole"
            ) from error
        with self._warning:
            if not self._warned and not self._ending:  # those that are ended at the end are no news
                log.warning("images: prepared by threads where no process can be had: %s", error)
            self._warned = True

    def __enter__(self) -> "Ahead":
        if self._wanted:
            try:
                self._start_processes()
            except StartError as error:
                self._do_without(error)
        # Not concurrent.futures: Python waits for its threads when it ends, also for one that hangs.
        for number in range(self._workers):
            process = self._processes[number] if self._processes else None
            thread = threading.Thread(target=self._work, args=(process,), name=f"medrl-data-{number}", daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def _tidy_when_started(self, folder: "TemporaryDirectory[str]") -> None:
        """Processes read the folder when they start: nothing of it is left for whoever kills this one later."""
        for process in self._processes:
            with suppress(StartError):  # is told by the thread that was to have the process
                process.ready(wait=True)
            if self._ending:  # the others may be closed by now
                return
        folder.cleanup()

    def _start_processes(self) -> None:
        """All, or none: what some of them hold, the run may need when there is no more to be had."""
        if (encoder := self.policy.encoder) is None:
            return
        with ExitStack() as held:
            folder = save_processor(encoder)
            held.callback(folder.cleanup)
            processes: list[EncodingProcess] = []
            held.callback(close_all, processes)
            for _ in range(self._workers):
                processes.append(EncodingProcess(encoder, Path(folder.name)))
            self._processes, self._held = processes, held.pop_all()
        thread = threading.Thread(target=self._tidy_when_started, args=(folder,), name="medrl-data-start", daemon=True)
        self._threads.append(thread)
        thread.start()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(queue.Empty):
            while True:  # what nobody waits for any more
                self._tasks.get_nowait()
        for _ in range(self._workers):
            self._tasks.put(None)
        self._ending = True
        for process in self._processes:  # who is in the middle of a prompt has it ended
            process.kill()
        ends = time.monotonic() + GRACE_S
        for thread in self._threads:
            thread.join(max(0.0, ends - time.monotonic()))
        self._held.close()


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
