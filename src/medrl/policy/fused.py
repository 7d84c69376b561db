"""The choice of medrl's own Triton kernels over torch's operations: made once per policy and place, and logged.

``policy.kernels`` says what is wanted: ``auto`` takes them on a GPU where they work. Before any is used, it is run on a
few random numbers and compared with the plain computation, on the GPU that is there.
"""

import importlib
import logging
import subprocess
from collections.abc import Callable
from functools import cache, wraps
from typing import Any, Literal

import torch
from torch.utils._triton import has_triton

from medrl.errors import PolicyError
from medrl.policy import logprobs

log = logging.getLogger(__name__)
Kernels = Literal["auto"] | bool
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 3e-3}
"""Largest difference to the plain computation that rounding can explain, for numbers around 1."""


def choose(what: str, wanted: Kernels, device: torch.device, problem: str | None) -> bool:
    """Whether ``what`` goes through fused kernels, given what keeps it from that.

    Raises ``PolicyError`` where they are asked for and cannot be had.
    """
    if wanted is False or (wanted == "auto" and device.type != "cuda"):  # a choice among one is no news
        return False
    how = "chosen by auto" if wanted == "auto" else "as asked"
    if problem is None:
        log.info("%s: fused kernels (%s on %s)", what, how, device)
    elif wanted is True:
        raise PolicyError(f"policy.kernels is true, but for {what} {problem}: set policy.kernels to auto or false")
    else:
        log.warning("%s: without fused kernels (%s on %s): %s", what, how, device, problem)
    return problem is None


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why no kernel can run there; None where they can."""
    if device.type != "cuda":
        return f"the kernels are for a CUDA GPU, not for a {device.type}"
    if not has_triton():
        return "Triton, which compiles the kernels, is missing or does not know this GPU"
    if dtype not in TOLERANCE:
        return f"there are no kernels for {str(dtype).removeprefix('torch.')}"
    return None


def or_why_not_built(compare: Callable[..., str | None]) -> Callable[..., str | None]:
    """A comparison of kernels that also says why there are none to compare: a card may be too small for one.

    Triton compiles at the first call, with a C compiler, in files of its own: what is missing there is a RuntimeError,
    an OSError, or the compiler's exit.
    """

    @wraps(compare)
    def compare_or_say(*given: Any) -> str | None:
        triton: Any = importlib.import_module("triton.errors")  # not everywhere
        try:
            return compare(*given)
        except (torch.OutOfMemoryError, torch.AcceleratorError):  # RuntimeErrors that torch's operations end with, too
            raise
        except (triton.TritonError, RuntimeError, OSError, subprocess.CalledProcessError) as error:
            return f"the kernels cannot be built here ({type(error).__name__}: {' '.join(str(error).split())})"

    return compare_or_say


def head_is_fused(wanted: Kernels, device: torch.device, dtype: torch.dtype) -> bool:
    """Whether ``head_kernels`` go over the head's logits, or torch's operations do."""
    asked = wanted is True or (wanted == "auto" and device.type == "cuda")
    return choose("head", wanted, device, (obstacle(device, dtype) or head_differs(device)) if asked else None)


def head_kernels() -> Any:
    """The kernels; only there where Triton is."""
    return importlib.import_module("medrl.policy.head_kernels")


@cache
@or_why_not_built
def head_differs(device: torch.device) -> str | None:
    """Compare what the kernels make of a few random logits, more than one program has, with the plain computation."""
    kernels = head_kernels()
    generator = torch.Generator(device).manual_seed(0)
    logits = 3 * torch.randn(3, kernels.WORDS + 5, device=device, generator=generator)
    targets = torch.tensor([0, kernels.WORDS + 4, 7], device=device)
    grad, of_entropy = torch.randn(2, 3, device=device, generator=generator)
    plain = logprobs.statistics(logits.clone(), targets, 0.7)
    found = kernels.statistics(logits, targets, 0.7)
    normalizer, entropy = plain[2], plain[1]
    rest = (targets, normalizer, entropy, grad, of_entropy, 0.7, torch.float32)
    pairs = [*zip(found, plain, strict=True), (kernels.slopes(logits, *rest), logprobs.slopes(logits.clone(), *rest))]
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    if difference <= TOLERANCE[torch.float32]:
        return None
    return f"the kernels give other numbers on this GPU (by {difference:.2g})"
