"""What a training run takes of a GPU's memory, part by part, from the shapes of its model and of its steps.

Weights, gradients and moments are exact. Activations go with the outputs of the matrices, times a factor that was
measured once for eager layers, with a prototype of this engine; kernels' workspaces and what is lost between tensors
come on top, so a share is kept free.
"""

from dataclasses import dataclass, replace

from medrl.bench.limits import PATCH_VALUES, Work, head_weights, layer_weights, parameters
from medrl.bench.models import Size

KEPT_FREE = 0.1
"""Share of the card that is not planned with: CUDA's context, workspaces, fragments."""
COPIES = 2.5
"""Values kept for the backward pass per output of a matrix: 3.3 MB a token and 1.9 MB a patch, over 23,040 and 11,520
outputs in each of 28 and 32 layers. Measured with a prototype of this engine (Qwen2-VL-2B's architecture, random
bfloat16 weights, eager layers, one H100, torch 2.11, transformers 5.17); this engine has not run on a GPU yet. Counted
tensor by tensor (``benchmarks/walk_memory.py``) it keeps 2.9 MB a token and 1.8 MB a patch."""
DRAWN_BYTES = 8
"""Per row and word of the vocabulary while a token is drawn: logits, and each word's share of its block, in float32."""
LORA_SHARE = 0.01
"""Adapters over the weights they adapt: about rank 16 on a 2B."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """How a run lies in memory."""

    gpus: int = 1
    element_bytes: int = 2
    """Of a weight in the forward pass; below 4 the optimizer keeps the lower halves of float32 weights."""
    fsdp: bool = False
    reference: bool = True
    offload_reference: bool = False
    lora: bool = False
    freeze_vision: bool = False
    checkpoint_activations: bool = False
    tokens_per_micro_batch: int | None = None
    """None: one group at a time, the least that is possible."""
    samples: bool = True
    """Whether this process writes completions; no for supervised training, and where a server does."""


def vision_weights(size: Size) -> int:
    """Of tower and merger."""
    return parameters(size) - layer_weights(size) - head_weights(size) * (1 if size.tied else 2)


def trained_weights(size: Size, layout: Layout) -> int:
    """How many weights the optimizer steps."""
    if layout.lora:
        return int(LORA_SHARE * layer_weights(size))
    return parameters(size) - (vision_weights(size) if layout.freeze_vision else 0)


def memory(size: Size, work: Work, layout: Layout) -> dict[str, int]:
    """Bytes on one GPU, by part; ``work`` is what one rank does of a step."""
    b, all_weights, trained = layout.element_bytes, parameters(size), trained_weights(size, layout)
    pieces = layout.gpus if layout.fsdp else 1
    summed = is_summed(size, work, layout)
    reference = all_weights - (vision_weights(size) if layout.freeze_vision else 0)
    if layout.offload_reference:
        reference = head_weights(size) * (1 if size.tied else 2) + layer_weights(size) // size.layers
    if not layout.reference or layout.lora:
        reference = 0
    parts = {
        "weights": b * all_weights,
        "float32 weights": 4 * trained // pieces if layout.fsdp else 0,
        "lower halves": 2 * trained if b < 4 and not layout.fsdp else 0,
        "gradients": 4 * trained // pieces if summed else 0,
        "moments": 8 * trained // pieces,
        "reference": b * reference,
        "rollouts": rollout_bytes(size, work, b) if layout.samples else 0,
        "activations": activation_bytes(size, work, layout),
    }
    if layout.fsdp:  # weights outside of layers stay gathered in a pass, and one layer with its gradient
        outside = head_weights(size) * (1 if size.tied else 2)
        parts["gathered weights"] = b * outside + (b + 4) * (layer_weights(size) // size.layers + outside)
    elif b < 4:  # summed at once, so only the largest is held
        parts["half gradients"] = b * (min(trained, head_weights(size)) if summed else trained)
    return {name: amount for name, amount in parts.items() if amount}


def is_summed(size: Size, work: Work, layout: Layout) -> bool:
    """Whether there are float32 gradients of all weights: not where a step goes through whole in half precision."""
    if layout.element_bytes >= 4 or layout.gpus > 1:
        return True
    if work.prompts == 1:
        return False
    asked = layout.tokens_per_micro_batch
    group = activation_bytes(size, work, replace(layout, tokens_per_micro_batch=None))
    return asked is None or asked * activations_per_token(size, layout) < work.prompts * group


def rollout_bytes(size: Size, work: Work, element_bytes: int) -> int:
    """Keys and values of all rows of a rank, and what drawing a token takes, at most.

    Held between steps as well: the captured graphs of decode steps keep their buffers, which those for fewer rows
    share, and so they do what a step takes for a moment (``rollout/captured.py``).
    """
    per_token = 2 * size.layers * size.kv_heads * (size.hidden // size.heads) * element_bytes
    cached = per_token * (work.prompts * work.prompt_length + work.rows * work.completion_tokens)
    return cached + DRAWN_BYTES * work.rows * size.vocabulary


def activation_bytes(size: Size, work: Work, layout: Layout) -> int:
    """Of the larger of a micro-batch and a single group."""
    tokens = work.prompt_length + work.group * work.completion_tokens
    patches = 0 if layout.freeze_vision or layout.lora else work.patches
    per_token, per_patch = activations_per_token(size, layout), activations_per_patch(size, layout)
    group = tokens * per_token + patches * per_patch
    if layout.tokens_per_micro_batch is None:
        return group
    return max(group, layout.tokens_per_micro_batch * per_token)


def activations_per_token(size: Size, layout: Layout) -> int:
    """Bytes that the backward pass needs of a token in the language model."""
    kv = 2 * size.kv_heads * (size.hidden // size.heads)
    outputs = 3 * size.hidden + kv + 2 * size.intermediate
    return _kept(outputs, size.hidden, size.layers, layout)


def activations_per_patch(size: Size, layout: Layout) -> int:
    """Bytes that the backward pass needs of a patch in a vision tower that learns."""
    outputs = 3 * size.vision_hidden + size.vision_hidden + 4 * size.vision_hidden + size.vision_hidden
    return _kept(outputs, size.vision_hidden, size.vision_layers, layout) + PATCH_VALUES * layout.element_bytes


def _kept(outputs: int, hidden: int, layers: int, layout: Layout) -> int:
    of_a_layer = COPIES * outputs * layout.element_bytes
    if layout.checkpoint_activations:  # the input of every layer, and one layer anew
        return int(layers * hidden * layout.element_bytes + of_a_layer)
    return int(layers * of_a_layer)


def peak(parts: dict[str, int]) -> int:
    """Bytes at the worst moment, in the backward pass: what rollouts take is kept for the next step."""
    return sum(parts.values())


CURES: dict[str, dict[str, bool]] = {
    "policy.checkpoint_activations=true": {"checkpoint_activations": True},
    "scale.offload_reference=true": {"offload_reference": True},
    "scale.strategy=fsdp": {"fsdp": True},
    "policy.freeze_vision=true": {"freeze_vision": True},
}
"""What to try, in this order: what costs least of the result first. Each is kept while the next is tried."""


def cure(size: Size, work: Work, layout: Layout, room: float) -> tuple[list[str], Layout] | None:
    """Settings that make it fit into ``room`` bytes, and the layout they make: one alone if one will do, else those of
    the table together, else adapters; None where nothing does."""
    usable = {
        name: change
        for name, change in CURES.items()
        if not (name == "scale.strategy=fsdp" and (layout.gpus == 1 or layout.lora))
        and not (name == "scale.offload_reference=true" and (not layout.reference or layout.lora))
        and any(getattr(layout, field) != value for field, value in change.items())
    }
    for name, change in usable.items():
        alone = replace(layout, **change)  # type: ignore[arg-type]
        if peak(memory(size, work, alone)) <= room:
            return [name], alone
    names, together = [], layout
    for name, change in usable.items():
        names, together = [*names, name], replace(together, **change)  # type: ignore[arg-type]
        if peak(memory(size, work, together)) <= room:
            return names, together
    names = ["policy.lora={}", "policy.checkpoint_activations=true"]
    adapters = replace(layout, lora=True, fsdp=False, offload_reference=False, checkpoint_activations=True)
    return (names, adapters) if peak(memory(size, work, adapters)) <= room else None
