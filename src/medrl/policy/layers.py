"""Layer transforms that save memory or time without changing results (beyond rounding): recompute, compile, offload."""

import inspect
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, Literal

import torch
from torch import nn
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters
from torch.utils._triton import has_triton
from torch.utils.checkpoint import checkpoint

from medrl.errors import PolicyError
from medrl.policy.attention import BY_ITSELF

log = logging.getLogger(__name__)
Compilation = Literal["auto"] | bool


def checkpoint_activations(layers: Sequence[nn.Module]) -> None:
    """Keep only each layer's input for the backward pass, and run the layer again there.

    Only while gradients are on: rollouts run each layer once. (transformers' own switch needs the model in training
    mode.)
    """
    for layer in layers:
        layer.forward = MethodType(_recomputed, layer)


def _recomputed(layer: Any, *inputs: Any, **options: Any) -> Any:
    forward = _forward_of(layer)
    if not torch.is_grad_enabled():
        return forward(layer, *inputs, **options)
    return checkpoint(forward, layer, *inputs, use_reentrant=False, **options)


def keep_in_main_memory(layers: Sequence[nn.Module], device: torch.device) -> None:
    """Let weights that are not trained wait in main memory; each layer's are on ``device`` while it computes."""
    for layer in layers:
        waiting = [(parameter, _waiting(parameter, device)) for parameter in layer.parameters()]
        for parameter, data in waiting:
            assert not parameter.requires_grad, "the gradient of a weight that comes and goes would be lost"
            parameter.data = data

        def fetch(*_: object, waiting=waiting) -> None:
            for parameter, data in waiting:
                parameter.data = data.to(device, non_blocking=True)

        def release(*_: object, waiting=waiting) -> None:
            for parameter, data in waiting:
                parameter.data = data

        layer.register_forward_pre_hook(fetch)
        layer.register_forward_hook(release)


def _waiting(parameter: nn.Parameter, device: torch.device) -> torch.Tensor:
    data = parameter.data.cpu()
    return data.pin_memory() if device.type == "cuda" else data  # pinned: Python goes on while it is copied


def choose_compilation(wanted: Compilation, device: torch.device) -> bool:
    """Whether to compile the layers of a model on this device: ``auto`` does on a GPU, where launches cost time.

    Raises ``PolicyError`` where it is asked for and cannot be had.
    """
    if wanted is False or (wanted == "auto" and device.type != "cuda"):
        return False
    problem = compilation_obstacle(device)
    if problem is None:
        log.info("layers: compiled (%s on %s)", "chosen by auto" if wanted == "auto" else "as asked", device)
    elif wanted == "auto":
        log.warning("layers: not compiled (chosen by auto on %s): %s", device, problem)
    else:
        raise PolicyError(
            f"policy.compile_layers is true, but {problem}: install it, or set policy.compile_layers=false"
        )
    return problem is None


def compilation_obstacle(device: torch.device) -> str | None:
    """Why layers cannot be compiled for a device; None where they can."""
    if device.type == "cuda" and not has_triton():
        return "Triton, which makes the kernels, is missing or does not know this GPU"
    # On a GPU it compiles what launches Triton's kernels.
    names = [os.environ.get("CXX" if device.type == "cpu" else "CC", ""), *COMPILERS[device.type == "cpu"]]
    if not any(name and shutil.which(name) for name in names):
        return f"a compiler ({' or '.join(COMPILERS[device.type == 'cpu'])}) is missing"
    return None


COMPILERS = {True: ("g++", "clang++"), False: ("gcc", "cc", "clang")}
"""Whether for a CPU -> what would do."""


def compile_layers(layers: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Fuse what surrounds the matrix products of each layer, for any number of tokens.

    One compilation serves all layers: they run the same code on other weights. Attention is cut out (``BY_ITSELF``):
    it has kernels of its own.
    """
    # The compiler counts variants by code and gives up after a few. Newer transformers put the same code, a wrapper
    # that recomputes layers when asked to, around every kind of layer.
    forward = inspect.unwrap(type(layers[0]).forward)
    compiled: Any = torch.compile(forward, dynamic=True, backend=backend)
    for layer in layers:
        setattr(layer, COMPILED, (compiled,))  # in a tuple: a function would be bound, a module registered
        if "forward" not in vars(layer):
            layer.forward = MethodType(_compiled, layer)


COMPILED = "_medrl_compiled_forward"


def _compiled(layer: Any, *inputs: Any, **options: Any) -> Any:
    # transformers' own generate hands in a cache, which the compiler would look into at every token.
    if any(options.get(name) is not None for name in ("cache", "past_key_values")):  # the name changed in transformers
        return type(layer).forward(layer, *inputs, **options)
    hidden, *rest = inputs
    if hidden._is_view():  # the first layer's: the compiler would make a variant of everything for it
        hidden = hidden.clone()
    with compiling():
        return getattr(layer, COMPILED)[0](layer, hidden, *rest, **options)


def _forward_of(layer: Any) -> Any:
    return _compiled if hasattr(layer, COMPILED) else type(layer).forward


@contextmanager
def compiling() -> Iterator[None]:
    """Raise ``PolicyError`` where the compiler fails."""
    try:
        yield
    except TorchDynamoException as error:
        reason = " ".join(str(error).strip().partition("\n\n")[0].split())
        raise PolicyError(f"the layers cannot be compiled here: {reason}. Set policy.compile_layers=false") from error


@contextmanager
def naming_cuts() -> Iterator[None]:
    """Say what keeps the compiler from taking a layer whole, besides attention: every cut costs speed, no exactness."""
    before = Counter(counters["graph_break"])
    yield
    for reason in Counter(counters["graph_break"]) - before:
        if BY_ITSELF not in reason:
            log.warning("layers: compiled in more pieces than they should be: %s", reason)
