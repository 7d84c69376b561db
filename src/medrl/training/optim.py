"""AdamW with float32 master weights, gradient clipping and the learning-rate schedule."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from medrl.errors import CheckpointError, NonFiniteError
from medrl.settings import Settings
from medrl.training.distributed import gathered, sum_gradients, world_size

HALF = (torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq")
WIDENED = 2**28
"""Half-precision gradients that are widened at a time while they are stepped: a gigabyte, or one parameter's."""


class Optim(Settings):
    """Settings of the optimizer; the defaults are those both papers ran with (TRL 0.14, Hugging Face's AdamW)."""

    lr: float = Field(default=1e-6, gt=0)
    """Peak learning rate."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """How the learning rate falls from its peak after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises to its peak; the first one is not at 0."""
    min_lr_fraction: float = Field(default=0.0, ge=0, le=1)
    """Where the schedule ends, as a fraction of the peak."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the first and second moment."""
    eps: float = Field(default=1e-8, gt=0)
    """Added to the root of the second moment."""
    weight_decay: float = Field(default=0.0, ge=0)
    """Decoupled decay of matrices; biases and norm scales are not decayed."""
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients are scaled down to this global norm when they exceed it."""

    @field_validator("betas")
    @classmethod
    def _moments_forget(cls, value: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in value):
            raise ValueError(f"betas is {list(value)}, but each must be at least 0 and less than 1")
        return value


def learning_rate(settings: Optim, step: int, steps: int) -> float:
    """Learning rate of optimizer step ``step`` (from 0) of ``steps``.

    Warm-up rises by equal amounts and reaches the peak on its last step. After it, ``linear`` and ``cosine`` start at
    the peak and would reach ``min_lr_fraction`` of it at step ``steps``, one past the last.
    """
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = min(1.0, (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps))
    height = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return settings.lr * (settings.min_lr_fraction + (1 - settings.min_lr_fraction) * height[settings.schedule])


class Weight(NamedTuple):
    """A parameter of the model and the tensor that AdamW steps in its place."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    """The float32 copy of a half-precision parameter; the parameter itself otherwise."""

    @property
    def copied(self) -> bool:
        return self.master is not self.parameter

    @property
    def gradient(self) -> Tensor | None:
        """The float32 sum where there is one, else the parameter's own."""
        return self.parameter.grad if self.master.grad is None else self.master.grad


class AdamW:
    """``torch.optim.AdamW`` over float32 masters of half-precision parameters.

    An update of 1e-6 is lost in the 8 bits of a bfloat16 weight near 1, so the sum of updates is kept in float32 and
    rounded into the parameter after each step. Parameters in float32 or float64 are stepped as they are.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: Optim) -> None:
        """``parameters`` as from ``model.named_parameters()``; frozen ones are left out, tied ones are taken once."""
        self.settings = settings
        distinct = {id(parameter): (name, parameter) for name, parameter in reversed(list(parameters))}
        weights = [_weight(*named) for named in reversed(distinct.values()) if named[1].requires_grad]
        matrices = [weight for weight in weights if weight.parameter.ndim >= 2]
        others = [weight for weight in weights if weight.parameter.ndim < 2]
        self.weights = matrices + others
        self._parts = [_Part.of(part, settings) for part in _divide(self.weights)]

    def accumulate(self) -> None:
        """Add half-precision gradients to their float32 sums and clear them.

        Call it before each further ``backward`` of a step that is cut into micro-batches: sums kept in bfloat16 would
        depend on the cut. ``step`` does it for the last one; without a cut there are no sums, and no memory for them.
        """
        for weight in self.weights:
            if weight.copied and weight.parameter.grad is not None:
                gradient = weight.parameter.grad.to(weight.master.dtype)
                weight.master.grad = gradient if weight.master.grad is None else weight.master.grad.add_(gradient)
                weight.parameter.grad = None

    def sum_over_ranks(self) -> None:
        """Give every process that trains along the gradient of all; nothing where there is one."""
        if world_size() > 1:
            self.accumulate()
            sum_gradients(weight.master for weight in self.weights)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip, update the parameters, clear the gradients. Returns the global gradient norm before clipping.

        A parameter without a gradient is left alone, by the decay too. Raises ``NonFiniteError`` naming the parameter
        before any weight or moment changes; the gradients stay, ``zero_grad`` drops them.
        """
        if any(weight.copied and weight.master.grad is not None for weight in self.weights):
            self.accumulate()
        norm = self._norm()
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            raise NonFiniteError(self._describe_non_finite())
        for part in self._parts:
            part.step(lr, norm, self.settings.max_grad_norm)
        return grad_norm

    def _norm(self) -> Tensor:
        """Of all gradients together."""
        gradients = [gradient for weight in self.weights if (gradient := weight.gradient) is not None]
        if not any(gradient.dtype in HALF for gradient in gradients):
            return gathered(get_total_norm(gradients))
        # get_total_norm's norms would be rounded to half precision.
        norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        return torch.linalg.vector_norm(torch.stack(norms))

    def zero_grad(self) -> None:
        """Drop all gradients, summed or not."""
        for weight in self.weights:
            weight.parameter.grad = None
            weight.master.grad = None

    def moments_to_come(self) -> int:
        """Bytes that moments will take and do not take yet."""
        missing = [weight.master for part, weight in self._each() if not part.state(weight)]
        return len(MOMENTS) * sum(master.nbytes for master in missing)

    def bytes_of_sums(self) -> int:
        """What the float32 sums of half-precision gradients take in a step that is cut."""
        return sum(weight.master.nbytes for weight in self.weights if weight.copied)

    def bytes_saved(self) -> int:
        """What ``state_dict`` will hold once every parameter has been stepped."""
        return sum(weight.master.nbytes * (len(MOMENTS) + weight.copied) for weight in self.weights)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that the model's own weights do not hold: tensors for safetensors, and integers for JSON.

        The tensors are ``<parameter>.exp_avg``, ``<parameter>.exp_avg_sq`` and, for half-precision parameters,
        ``<parameter>.master``: the live ones, not copies. The integers are the steps each parameter has taken.
        """
        tensors: dict[str, Tensor] = {}
        steps: dict[str, int] = {}
        for part, weight in self._each():
            if weight.copied:
                tensors[f"{weight.name}.master"] = weight.master
            state = part.state(weight)
            if state:
                steps[weight.name] = int(state["step"])
                tensors |= {f"{weight.name}.{moment}": state[moment] for moment in MOMENTS}
        return tensors, steps

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Continue exactly where ``state_dict`` was taken; half-precision parameters are set from their masters.

        Raises ``CheckpointError``, before anything changes, for state that is not of these parameters.
        """
        self._check_fits(tensors, steps)
        states: dict[str, dict[str, Tensor]] = {}
        for weight in self.weights:
            if weight.copied:
                weight.master.copy_(tensors[f"{weight.name}.master"])
                weight.parameter.copy_(weight.master)
            if weight.name in steps:
                moments = {moment: tensors[f"{weight.name}.{moment}"].clone() for moment in MOMENTS}
                states[weight.name] = {"step": torch.tensor(float(steps[weight.name])), **moments}
        for part in self._parts:
            part.load(states)
        self.zero_grad()

    def _each(self) -> Iterator[tuple["_Part", Weight]]:
        return ((part, weight) for part in self._parts for weight in part.weights)

    def _check_fits(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        expected: dict[str, Weight] = {}
        for weight in self.weights:
            kinds = (["master"] if weight.copied else []) + (list(MOMENTS) if weight.name in steps else [])
            expected |= {f"{weight.name}.{kind}": weight for kind in kinds}
        unknown = sorted(set(steps) - {weight.name for weight in self.weights}) + sorted(set(tensors) - set(expected))
        missing = sorted(set(expected) - set(tensors))
        if unknown or missing:
            raise CheckpointError(
                "the optimizer state is of other parameters: "
                f"{_listed(missing)} missing from it, {_listed(unknown)} unknown to this model; "
                "resume with the model, precision and adapters the checkpoint was saved with"
            )
        for name, weight in expected.items():
            if tensors[name].shape != weight.master.shape:
                raise CheckpointError(
                    f"the optimizer state has {name} of shape {tuple(tensors[name].shape)}, but the parameter has "
                    f"{tuple(weight.master.shape)}; resume with the model the checkpoint was saved with"
                )
            if not bool(gathered(tensors[name]).isfinite().all()):
                raise NonFiniteError(f"the optimizer state has {name} that is not finite; nothing was changed")

    def _describe_non_finite(self) -> str:
        gradients = [(w.name, gathered(w.gradient)) for w in self.weights if w.gradient is not None]
        for name, gradient in gradients:
            broken = int((~gradient.isfinite()).sum())
            if broken:
                where = f"{broken} of {gradient.numel()} places"
                return f"the gradient of {name} is not finite in {where}; nothing was updated"
        name, gradient = max(gradients, key=lambda pair: float(pair[1].abs().max()))
        return (
            f"the gradient norm overflows; the largest gradient is {float(gradient.abs().max()):.3g}, of {name}; "
            "nothing was updated"
        )


class _Part:
    """Parameters that are stepped together: matrices first, which decay, then the rest."""

    def __init__(self, weights: Sequence[Weight], adamw: torch.optim.AdamW) -> None:
        self.weights, self.adamw = weights, adamw

    @classmethod
    def of(cls, weights: Sequence[Weight], settings: Optim) -> "_Part":
        matrices = [weight.master for weight in weights if weight.parameter.ndim >= 2]
        others = [weight.master for weight in weights if weight.parameter.ndim < 2]
        groups = [{"params": matrices, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
        on_gpu = all(weight.master.is_cuda for weight in weights)
        return cls(
            weights,
            torch.optim.AdamW(
                groups,
                lr=settings.lr,
                betas=settings.betas,
                eps=settings.eps,
                fused=True if on_gpu else None,  # one kernel, and no temporaries of the size of the model
            ),
        )

    def step(self, lr: float, norm: Tensor, max_norm: float) -> None:
        """Clip to ``max_norm``, given the ``norm`` of all gradients, update, and clear the gradients."""
        for weight in self.weights:
            if weight.copied:
                weight.master.grad = None if weight.gradient is None else weight.gradient.float()
                weight.parameter.grad = None
        clip_grads_with_norm_([weight.master for weight in self.weights], max_norm, norm)
        for group in self.adamw.param_groups:
            group["lr"] = lr
        self.adamw.step()
        for weight in self.weights:
            if weight.copied:
                weight.parameter.copy_(weight.master)
            weight.parameter.grad = weight.master.grad = None

    def state(self, weight: Weight) -> Mapping[str, Tensor]:
        """The moments and the number of steps; empty before the first."""
        return self.adamw.state.get(weight.master, {})

    def load(self, states: Mapping[str, dict[str, Tensor]]) -> None:
        """Take the states by name; those of other parts are left alone."""
        mine = {index: states[weight.name] for index, weight in enumerate(self.weights) if weight.name in states}
        self.adamw.load_state_dict({"state": mine, "param_groups": self.adamw.state_dict()["param_groups"]})


def _divide(weights: Sequence[Weight]) -> list[list[Weight]]:
    """In parts of at most ``WIDENED`` numbers where gradients are widened; in one where they are not."""
    parts: list[list[Weight]] = []
    room = 0
    for weight in weights:
        size = weight.master.numel() if weight.copied else 0
        if not parts or size > room:
            parts.append([])
            room = WIDENED
        parts[-1].append(weight)
        room -= size
    return parts


def _weight(name: str, parameter: nn.Parameter) -> Weight:
    return Weight(name, parameter, parameter.detach().float() if parameter.dtype in HALF else parameter)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else "none"
