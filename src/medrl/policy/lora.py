"""LoRA through peft: few trainable weights; the reference is the same model with adapters disabled.

Source: Hu et al. 2021, arXiv 2106.09685.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from pydantic import Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from medrl.errors import CheckpointError, SettingsError
from medrl.settings import Settings

FOLDER = "adapter"
"""Where in a saved model the adapters lie, in peft's format; the model around it has them merged in."""
WEIGHTS = "adapter_model.safetensors"
NAME = "default"
PREFIX = "base_model.model."


class Lora(Settings):
    """Adapters on every matrix of the language model's layers; everything else is frozen, the vision tower too."""

    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    """The adapters' product is scaled by alpha / rank."""
    matrices: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the matrices that get adapters."""


def add_lora(model: nn.Module, settings: Lora) -> None:
    """Put fresh adapters into ``model``; as they start at zero, it computes what it did.

    Raises ``SettingsError`` for matrices that its layers do not have.
    """
    there = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and "language_model.layers." in name
    }
    if unknown := sorted(set(settings.matrices) - there):
        raise SettingsError(
            f"policy.lora.matrices has {', '.join(unknown)}, but the layers of the language model have "
            f"{', '.join(sorted(there))}: name some of those"
        )
    names = "|".join(settings.matrices)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # typed as an integer, used as a factor
        target_modules=rf".*language_model\.layers\.\d+\..*\.({names})",
        lora_dropout=0.0,  # the update recomputes what the sampler saw: no draw may lie between them
        bias="none",
    )
    # peft draws the adapters' start from the global generator; a run's start must not depend on what was drawn before.
    with torch.random.fork_rng():
        torch.manual_seed(0)
        peft.inject_adapter_in_model(config, model, adapter_name=NAME)
    model.peft_config = {NAME: config}  # type: ignore[assignment]


def has_lora(model: nn.Module) -> bool:
    return next(_layers(model), None) is not None


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Compute what the model computed before it had adapters."""
    layers = list(_layers(model))
    # Not peft's enable_adapters, which also freezes the adapters, of which a graph may be waiting for its backward.
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


class WithoutAdapters:
    """A family as it was before its model had adapters; all else is that family's."""

    def __init__(self, family: Any) -> None:
        self._family = family

    def __getattr__(self, name: str) -> Any:
        return getattr(self._family, name)

    def hidden(self, *inputs: Any, **options: Any) -> Tensor:
        with adapters_off(self._family.model):
            return self._family.hidden(*inputs, **options)

    def image_features(self, *inputs: Any, **options: Any) -> Tensor:
        with adapters_off(self._family.model):
            return self._family.image_features(*inputs, **options)


@torch.no_grad()
def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a model without adapters that computes the same, up to their rounding; nothing is changed."""
    state: dict[str, Tensor] = {}
    layers: dict[str, Any] = {
        name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    }
    for name, tensor in model.state_dict().items():
        if ".lora_" in name:
            continue
        owner = name.partition(".base_layer.")[0]
        if owner in layers and name.endswith(".base_layer.weight"):
            adapted: Any = layers[owner]
            tensor = tensor + adapted.get_delta_weight(NAME).to(tensor.dtype)
        state[name.replace(".base_layer.", ".")] = tensor
    return state


def save_lora(model: Any, folder: Path) -> None:
    """Write the adapters as peft reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config[NAME].save_pretrained(folder)
    weights = {PREFIX + name.replace(f".{NAME}.", "."): tensor for name, tensor in _adapters(model).items()}
    save_file({name: tensor.detach().contiguous() for name, tensor in weights.items()}, folder / WEIGHTS)


@torch.no_grad()
def load_lora(model: nn.Module, folder: Path) -> None:
    """Take the adapters that ``save_lora`` wrote. Raises ``CheckpointError`` when they are not of this model."""
    saved = load_file(folder / WEIGHTS)
    ours = {PREFIX + name.replace(f".{NAME}.", "."): tensor for name, tensor in _adapters(model).items()}
    if {name: t.shape for name, t in saved.items()} != {name: t.shape for name, t in ours.items()}:
        raise CheckpointError(
            f"the adapters in {folder} are not those of this model: resume with the policy.lora settings and the model "
            "the run was started with"
        )
    for name, tensor in ours.items():
        tensor.copy_(saved[name])


def _adapters(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if ".lora_" in name}


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if isinstance(module, BaseTunerLayer))
