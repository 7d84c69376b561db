"""What a model is loaded from: settings, folders that are whole, the hub, and errors that say what is missing."""

import json
from collections.abc import Collection
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from safetensors import SafetensorError

from medrl.errors import PolicyError, SettingsError
from medrl.policy.lora import Lora
from medrl.settings import Settings

Dtype = Literal["float32", "bfloat16", "float16", "float64"]
DEMO_BASE = "demo-base"


class PolicySettings(Settings):
    """Which model to train, and how to load it."""

    model: str
    """A folder with a Hugging Face model and processor, a hub id, or ``demo-base``."""
    dtype: Dtype = "bfloat16"
    """Precision of the weights in the forward pass; the optimizer steps in float32. float16 only evaluates."""
    freeze_vision: bool = False
    """Leave the vision tower as it is."""
    min_pixels: int | None = Field(default=None, ge=1)
    max_pixels: int | None = Field(default=None, ge=1)
    """Bounds on an image's area after resizing; None keeps the processor's own (the papers: 401408)."""
    attention: Literal["auto", "dense", "flex", "varlen"] = "auto"
    """Back end of packed attention; auto takes the fastest that works on the device, and the run records which."""
    lora: Lora | None = None
    """Train adapters of this shape instead of all weights; ``lora: {}`` takes the defaults."""
    checkpoint_activations: bool = False
    """Recompute layers in the backward pass: less memory, about a third more time, the same gradient."""
    compile_layers: Literal["auto"] | bool = "auto"
    """Fuse what surrounds the layers' matrix products, in training and decoding; auto does so on a GPU and says so."""
    kernels: Literal["auto"] | bool = "auto"
    """Decode, and go over the head's logits, with medrl's own Triton kernels; auto does so on a GPU where they work."""


def check_trainable(dtype: str) -> None:
    """Raise ``SettingsError`` for a precision whose gradients would be lost."""
    if dtype == "float16":
        raise SettingsError(
            "policy.dtype float16 cannot be trained in: its gradients underflow below 6e-8, and losses are not scaled "
            "here: set it to bfloat16 (or float32); float16 is for evaluation alone"
        )


def resolve_model(model: str) -> str:
    """What ``Policy.load`` opens for ``model``: the shipped folder for ``demo-base``, anything else unchanged.

    Raises ``PolicyError`` when this installation was packed without the demo's base model.
    """
    if model != DEMO_BASE:
        return model
    folder = Path(str(files("medrl").joinpath("demo", "base")))
    if not (folder / "config.json").is_file():
        raise PolicyError(
            f"this installation has no {DEMO_BASE} ({folder} holds no model): install medrl from its repository, or "
            "make one with 'medrl demo --rebuild-base' and give its folder"
        )
    return str(folder)


def check_folder(folder: Path) -> None:
    if not (folder / "config.json").is_file():
        raise PolicyError(
            f"{folder} is not a model folder: it has no config.json; give one that holds a Hugging Face model and its "
            f"processor, a hub id, or {DEMO_BASE}"
        )
    if not any(folder.glob("*.safetensors")):
        raise PolicyError(f"{folder} has no weights: expected model.safetensors (pickled weights are not loaded)")
    if not any((folder / name).is_file() for name in ("processor_config.json", "preprocessor_config.json")):
        raise PolicyError(
            f"{folder} has no processor (processor_config.json or preprocessor_config.json): copy the processor and "
            f"tokenizer files of the base model into it, or save both with Policy.save"
        )
    if not (folder / "tokenizer_config.json").is_file():
        raise PolicyError(
            f"{folder} has no tokenizer (tokenizer_config.json): copy the base model's tokenizer files into it"
        )
    try:
        json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise PolicyError(f"{folder / 'config.json'} is not JSON: {error}") from error


def from_hub(factory: Any, source: str, **options: Any) -> Any:
    try:
        return factory.from_pretrained(source, **options)
    except (OSError, ValueError, SafetensorError) as error:
        reason = str(error).partition("\n")[0]
        if Path(source).is_dir():
            raise PolicyError(
                f"cannot load the model folder {source}: {reason}. Download or copy the model again, it is not whole"
            ) from error
        raise PolicyError(
            f"cannot load {source!r}: it is no local folder, and the model hub did not give it "
            f"({reason}). Check the name, or download it and give the folder"
        ) from error


def check_weights(source: str, missing: Collection[str]) -> None:
    """Refuse a model some of whose weights were not in its files: transformers would fill them at random."""
    if missing:
        named = sorted(missing)
        shown = ", ".join(named[:3]) + (f" and {len(named) - 3} more" if len(named) > 3 else "")
        raise PolicyError(
            f"{source} lacks the weights {shown}: it is not whole, or not of the type its config.json says"
        )


def set_pixel_bounds(processor: Any, min_pixels: int | None, max_pixels: int | None) -> None:
    size = dict(processor.image_processor.size)
    if min_pixels is not None:
        size["shortest_edge"] = min_pixels
    if max_pixels is not None:
        size["longest_edge"] = max_pixels
    if size["shortest_edge"] > size["longest_edge"]:
        own = "min_pixels" if min_pixels is None else "max_pixels" if max_pixels is None else None
        raise PolicyError(
            f"min_pixels {size['shortest_edge']} is above max_pixels {size['longest_edge']}: "
            + (f"{own} is the model's own: set it, too" if own else "swap them")
        )
    processor.image_processor.size = size
