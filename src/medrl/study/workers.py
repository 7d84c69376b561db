"""Several workers on one machine: each is the command itself, in a process of its own, and takes cells of one study."""

import os
import subprocess
import sys
import time
from collections.abc import Sequence

from medrl import stopping

POLL_S = 0.2


def run_workers(words: Sequence[str], count: int) -> None:
    """Start ``count`` times ``medrl`` with these words and wait until all have ended; what they say goes to stderr.

    How they end is not looked at: what one leaves undone, others do. Raises Stopped when asked to stop, once they have
    saved and ended. Killed themselves or orphaned, they do no harm: the same command joins those that still work.
    """
    with stopping.at_safe_points():
        workers = [
            subprocess.Popen(
                [sys.executable, "-m", "medrl", *words],
                env={**os.environ, **environment(number, count)},
                stdout=subprocess.DEVNULL,
                start_new_session=True,  # a Ctrl-C of the terminal would be their second signal, which leaves at once
            )
            for number in range(count)
        ]
        try:
            while any(worker.poll() is None for worker in workers):
                stopping.check()
                time.sleep(POLL_S)
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.wait()


def environment(number: int, count: int) -> dict[str, str]:
    """What is a worker's own: a GPU, in turn, where there are any; and its part of the processor's cores."""
    threads = str(max(1, (os.cpu_count() or 1) // count))
    own = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads)}
    gpus = visible_gpus()
    return own | ({"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {})


def visible_gpus() -> list[str]:
    """Names of the GPUs that this process may use."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return named.split(",")[:count] if named else [str(number) for number in range(count)]
