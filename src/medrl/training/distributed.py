"""Many processes that train one policy: who does which part of a step, and what they tell each other.

    torchrun --nproc-per-node 8 -m medrl train RECIPE.yaml --out runs/ct

Every rank knows the whole step. It samples its share of the prompts; all exchange what was written, and each computes
the same advantages and weights, learns from its share of the groups, and adds up the gradients. So samples, rewards and
the loss do not depend on how many there are. Rank 0 writes. On one process all of this is nothing.
"""

import gc
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from medrl import errors
from medrl.errors import MedrlError, RunError, SettingsError
from medrl.runs import Run
from medrl.settings import Settings
from medrl.stopping import Stopped

T = TypeVar("T")
A = TypeVar("A")
PATIENCE = timedelta(hours=2)
"""How long a rank waits for another: a reward may ask a judge, a checkpoint may go to a slow disk."""
WORTH_A_MOVE = 0.05
"""Of the mean load: a group goes to another rank, which must read its images anew, only when that saves more."""


class Scale(Settings):
    """How a run is spread over processes; how many there are is said where it is launched."""

    strategy: Literal["ddp", "fsdp"] = "ddp"
    """ddp: every rank holds the whole training state. fsdp: float32 weights, gradients and moments lie in pieces on all
    ranks (FSDP2), computed in policy.dtype; every rank keeps whole weights for rollouts."""
    offload_reference: bool = False
    """Keep the reference's layers in main memory and bring each to the GPU when it computes."""


@contextmanager
def joined() -> Iterator[None]:
    """Within, this process is one of those that torchrun, accelerate or Slurm started together; alone, nothing."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1 or dist.is_initialized():
        yield
        return
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise SettingsError(
            f"WORLD_SIZE is {world}, but {', '.join(missing)} is not set: start with torchrun, accelerate launch or "
            "medrl launch, or unset WORLD_SIZE"
        )
    if torch.cuda.is_available():
        # A cluster may show each process its own GPU only.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    # Words go by gloo, on the CPU; gradients by whatever is made for the device they are on.
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        gc.collect()  # policies in pieces refer to their groups in circles, which would outlive the interpreter
        dist.destroy_process_group()


def world_size() -> int:
    """Processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This one's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def first() -> bool:
    """Whether this is the process that writes."""
    return rank() == 0


def gather(work: Callable[[], T]) -> list[T]:
    """What ``work()`` returned on each rank, in their order: plain JSON values, the same list everywhere.

    Where it raised on any rank, all raise, so that nobody waits for one who has given up, and nobody moves weights
    alone. A stop that one rank was asked for stops all. A mistake, an error that is none of ours, is raised as it is
    where it was made, and as a ``MedrlError`` that names it elsewhere.
    """
    if world_size() == 1:
        return [work()]
    value, failure = None, None
    try:
        with _Announced():
            value = work()
    except (MedrlError, Stopped) as error:
        failure = error
    message = {"value": value} if failure is None else {"error": type(failure).__name__, "words": str(failure)}
    answers = _exchange(message)
    failed = [(n, answer) for n, answer in enumerate(answers) if "error" in answer]
    if failed:
        # What went wrong is said rather than that somebody was asked to stop; of several, all ranks choose the same.
        n, answer = min(failed, key=lambda pair: (pair[1]["error"] == Stopped.__name__, pair[0]))
        if n == rank():
            assert failure is not None
            raise failure
        raise _error(answer, n)
    return [answer["value"] for answer in answers]


class _Announced:
    """Tells the other ranks, which wait for an answer, of a mistake that leaves this one without any."""

    def __enter__(self) -> None:
        """There is nothing to tell yet."""

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # Not where this process is to leave at once: the others may be in no state to meet.
        if isinstance(error, Exception) and not isinstance(error, MedrlError):
            _exchange({"error": MedrlError.__name__, "words": f"{type(error).__name__}: {error}"})


def from_first(work: Callable[[], T]) -> T:
    """What ``work()`` returns on rank 0, on every rank; the others do not run it."""
    return gather(lambda: work() if first() else None)[0]  # type: ignore[return-value]


def spread(items: Sequence[A], work: Callable[[list[A]], Sequence[T]]) -> list[T]:
    """``work`` over all ``items``, each rank on its share; the results of all, in order, on every rank."""
    n, found = world_size(), gather(lambda: list(work(list(share(items)))))
    return [found[i % n][i // n] for i in range(len(items))]


def share(items: Sequence[A]) -> Sequence[A]:
    """This rank's share of work of unknown cost: every ``world_size``-th item."""
    return items[rank() :: world_size()]


def balance(costs: Sequence[float], ranks: int) -> list[int]:
    """Rank that learns from each group: the one that sampled it, unless moving some evens out the tokens.

    Groups go, one at a time, from the rank with most to the one with least, for as long as that saves more than
    ``WORTH_A_MOVE``.
    """
    owners = [i % ranks for i in range(len(costs))]
    loads = [sum(costs[i] for i, owner in enumerate(owners) if owner == n) for n in range(ranks)]
    worth = WORTH_A_MOVE * sum(costs) / ranks
    while True:
        heavy, light = loads.index(max(loads)), loads.index(min(loads))
        best = min(
            (i for i, owner in enumerate(owners) if owner == heavy),
            key=lambda i: max(loads[heavy] - costs[i], loads[light] + costs[i]),
            default=None,
        )
        if best is None or loads[heavy] - max(loads[heavy] - costs[best], loads[light] + costs[best]) <= worth:
            return owners
        owners[best] = light
        loads[heavy] -= costs[best]
        loads[light] += costs[best]


@torch.no_grad()
def sum_gradients(gradients: Sequence[Tensor | None], zeros: Callable[[int], Tensor]) -> list[Tensor | None]:
    """Each gradient's sum over all ranks, in its place; one that no rank has stays None.

    Args:
        zeros: makes what a gradient, given by its place, is where only other ranks have one.
    """
    if world_size() == 1:
        return list(gradients)
    present = torch.tensor([gradient is not None for gradient in gradients], dtype=torch.uint8)
    dist.all_reduce(present, op=dist.ReduceOp.MAX)
    sums: list[Tensor | None] = []
    under_way = []
    for place, (gradient, anywhere) in enumerate(zip(gradients, present.tolist(), strict=True)):
        total = zeros(place) if gradient is None and anywhere else gradient
        if total is not None:
            under_way.append(dist.all_reduce(total, async_op=True))
        sums.append(total)
    for operation in under_way:
        assert operation is not None
        operation.wait()
    return sums


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may lie in pieces; a meeting of all ranks if it does."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_same(what: str, value: Callable[[], str]) -> None:
    """Raise ``RunError`` when ranks differ in what they must share."""
    if world_size() == 1:
        return
    found = gather(value)
    different = [n for n, other in enumerate(found) if other != found[0]]
    if different:
        raise RunError(
            f"rank {different[0]} has other {what} than rank 0: start all processes with the same files and versions, "
            "and resume from the newest checkpoint"
        )


class Listener(Run):
    """A run as ranks other than 0 see it: they read, rank 0 writes."""

    def append_metrics(self, row: Mapping[str, Any]) -> None:
        """Rank 0 does."""

    def append_rollouts(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rank 0 does."""

    def append_quarantine(self, row: Mapping[str, Any]) -> None:
        """Rank 0 does."""

    def append_pass_rates(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Rank 0 does."""

    def update_provenance(self, **facts: Any) -> None:
        """Rank 0 does."""

    def truncate(self, offsets: Mapping[str, int]) -> None:
        """Rank 0 does."""


def open_together(open_run: Callable[[], Run]) -> Run:
    """Rank 0 makes or opens the run; the others read what lies there then. The folder must be one that all see."""
    if world_size() == 1:
        return open_run()
    opened: list[Run] = []

    def open_first() -> str:
        opened.append(open_run())
        return str(opened[0].path)

    path = from_first(open_first)
    gather(lambda: None if first() else opened.append(Listener.open(path)))
    return opened[0]


def _exchange(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every rank's message; JSON, because whatever unpickles can be made to run code."""
    own = torch.frombuffer(bytearray(json.dumps(message).encode()), dtype=torch.uint8)
    sizes = [torch.zeros(1, dtype=torch.long) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)]))
    longest = max(int(size) for size in sizes)
    buffers = [torch.zeros(longest, dtype=torch.uint8) for _ in sizes]
    dist.all_gather(buffers, torch.cat([own, own.new_zeros(longest - len(own))]))
    return [
        json.loads(bytes(buffer[: int(size)].numpy().tobytes())) for buffer, size in zip(buffers, sizes, strict=True)
    ]


def _error(answer: Mapping[str, str], n: int) -> BaseException:
    if answer["error"] == Stopped.__name__:
        return Stopped()
    kind: Any = getattr(errors, answer["error"], MedrlError)
    if kind in (errors.ImageError, errors.MissingExtraError):  # made from parts, not from a sentence
        kind = MedrlError
    return kind(f"{answer['words']} (on rank {n})")
