"""Same recipe, same bits: the global generators that a user's code may draw from, and kernels that add in one order.

medrl itself draws from none of these generators: its order of examples and its completions are functions of seed and
step. But a reward is anybody's code, and its dice belong to the run as well.
"""

import os
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

CUBLAS = "CUBLAS_WORKSPACE_CONFIG"
"""Environment variable without which cuBLAS may add in any order."""


def seed_everything(seed: int) -> None:
    """Set the global generators of Python, NumPy and torch, on every device."""
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002  # the generator that others' code draws from
    torch.manual_seed(seed)


def random_state() -> dict[str, Tensor]:
    """Where the global generators stand."""
    _, words, gauss = random.getstate()
    numpy: dict[str, Any] = np.random.get_state(legacy=False)  # type: ignore[assignment]  # noqa: NPY002
    state = {
        "python": torch.tensor(words, dtype=torch.long),
        "python.gauss": torch.tensor([] if gauss is None else [gauss], dtype=torch.float64),
        "numpy": torch.tensor(
            [*numpy["state"]["key"].tolist(), numpy["state"]["pos"], numpy["has_gauss"]], dtype=torch.long
        ),
        "numpy.gauss": torch.tensor([numpy["gauss"]], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state |= {f"cuda.{number}": each for number, each in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: Mapping[str, Tensor]) -> None:
    """Put the global generators back to where ``random_state`` found them; those of absent devices are left out."""
    gauss = state["python.gauss"].tolist()
    random.setstate((3, tuple(state["python"].tolist()), gauss[0] if gauss else None))
    *keys, place, has_gauss = state["numpy"].tolist()
    cached = float(state["numpy.gauss"])
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), place, has_gauss, cached))  # noqa: NPY002
    torch.set_rng_state(state["torch"])
    for number in range(torch.cuda.device_count()):
        if f"cuda.{number}" in state:
            torch.cuda.set_rng_state(state[f"cuda.{number}"], number)


@contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Within, torch takes kernels that give the same bits each time, and warns by name where it has none.

    On a CPU they do so anyway. On a GPU sums by atomic additions, as in the backward pass of attention and of
    embeddings, are replaced by slower ones.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault(CUBLAS, ":4096:8")  # read when the first matrix product asks for a workspace
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark
