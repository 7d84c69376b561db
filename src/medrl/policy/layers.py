"""What may be done to layers for memory or speed without a change in any number: recompute, compile, keep elsewhere."""

from collections.abc import Sequence
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


def checkpoint_activations(layers: Sequence[nn.Module]) -> None:
    """Keep only each layer's input for the backward pass, and run the layer again there.

    Only while gradients are on: rollouts, which write a cache, run each layer once. (transformers' own switch would
    need the model in training mode, and takes the cache away.)
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
    return data.pin_memory() if device.type == "cuda" else data  # pinned: copied while the device computes


def compile_layers(layers: Sequence[nn.Module], backend: str = "inductor") -> None:
    """Fuse what surrounds the matrix products of each layer, for any number of tokens.

    One compilation serves all layers: they run the same code on other weights. Only passes without a cache are
    compiled: decoding on a GPU is captured whole instead.
    """
    compiled: Any = torch.compile(type(layers[0]).forward, dynamic=True, backend=backend)
    for layer in layers:
        setattr(layer, COMPILED, (compiled,))  # in a tuple: a function would be bound, a module registered
        if "forward" not in vars(layer):
            layer.forward = MethodType(_compiled, layer)


COMPILED = "_medrl_compiled_forward"


def _compiled(layer: Any, *inputs: Any, **options: Any) -> Any:
    if options.get("past_key_values") is not None:
        return type(layer).forward(layer, *inputs, **options)
    return _forward_of(layer)(layer, *inputs, **options)


def _forward_of(layer: Any) -> Any:
    return getattr(layer, COMPILED, (type(layer).forward,))[0]
