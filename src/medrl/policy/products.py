"""Float32 matrix products on a CPU, by the faster of the two libraries that torch has for them.

torch multiplies float32 matrices with MKL. On processors that are not Intel's, MKL leaves AVX-512 unused; oneDNN, which
torch brings along as well, does not, and takes about half the time there (LOG.md). Sums are in float32 either way.
"""

from functools import cache
from pathlib import Path
from types import MethodType
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LEAST_WORK = 2**22
"""Multiplications from which a product is worth the 0.4 ms that oneDNN takes to prepare for a shape it has not seen."""

FEW_ROWS = 256
"""Rows up to which a weight's own order is what a product without a gradient waits for: tokens that are decoded."""
LARGEST_PACKED = 2**22
"""Elements of a weight of which a second copy is held."""


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K), (K, N) -> (M, N); nothing is kept for a gradient."""
    if _by_onednn(a, b.shape[1]):
        return torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return a @ b


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: (..., K), (N, K) -> (..., N)."""
    if torch.compiler.is_compiling() or not _by_onednn(x, len(weight)):
        return F.linear(x, weight, bias)
    out: Any = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, bias)
    return out.view(*x.shape[:-1], -1)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad, (to_x, to_weight, to_bias) = grads[0], ctx.needs_input_grad
        return (
            product(grad, weight) if to_x else None,
            product(grad.t(), x) if to_weight else None,
            grad.sum(0) if to_bias else None,
        )


def use_fast_products(model: nn.Module) -> None:
    """Let every linear layer of a model choose; one that is compiled leaves it to the compiler."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = MethodType(_forward, module)


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    if torch.compiler.is_compiling():
        return F.linear(x, module.weight, module.bias)
    if torch.is_grad_enabled() or x.numel() > FEW_ROWS * x.shape[-1] or not _by_onednn(x, len(module.weight)):
        _packed.pop(module, None)
        return linear(x, module.weight, module.bias)
    return torch.ops.mkldnn._linear_pointwise(x, _pack(module), module.bias, "none", [], "")


_packed: WeakKeyDictionary[nn.Linear, tuple[tuple[int, int], Tensor]] = WeakKeyDictionary()


def _pack(module: nn.Linear) -> Tensor:
    """The weight as oneDNN reads it: it would be put into that order anew for every token that is decoded.

    Held until the weight changes or is asked for a gradient.
    """
    weight = module.weight.detach()
    if weight.numel() > LARGEST_PACKED:
        return weight
    state = (weight._version, weight.data_ptr())
    if module not in _packed or _packed[module][0] != state:
        _packed[module] = (state, torch.ops.mkldnn._reorder_linear_weight(weight, FEW_ROWS))
    return _packed[module][1]


def _by_onednn(a: Tensor, columns: int) -> bool:
    return (
        a.dtype == torch.float32 and a.device.type == "cpu" and a.numel() * columns >= LEAST_WORK and onednn_is_faster()
    )


@cache
def onednn_is_faster() -> bool:
    """Known from the processor, not measured: the same run on the same machine gives the same bits."""
    if not torch.backends.mkldnn.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    about = Path("/proc/cpuinfo")
    return about.is_file() and "GenuineIntel" not in about.read_text(encoding="utf-8", errors="replace")
