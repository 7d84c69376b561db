"""AdamW with float32 master weights, gradient clipping and the learning-rate schedule."""

import math
from collections.abc import Iterable, Mapping
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
PORTION_BYTES = 2**29
"""Of float32 masters that are stepped together where their gradients are still in half precision."""


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
        on_gpu = bool(weights) and all(weight.master.is_cuda for weight in weights)
        self._adamw = torch.optim.AdamW(
            [
                {"params": [weight.master for weight in matrices], "weight_decay": settings.weight_decay},
                {"params": [weight.master for weight in others], "weight_decay": 0.0},
            ],
            lr=settings.lr,
            betas=settings.betas,
            eps=settings.eps,
            fused=True if on_gpu else None,  # one kernel, and no temporaries of the size of the model
        )

    def accumulate(self) -> None:
        """Add half-precision gradients to their float32 sums and clear them.

        Call it after each ``backward`` of a step that is cut into micro-batches: sums kept in bfloat16 would depend on
        the cut. ``step`` does so for the last one, and for the only one of a step, whose sum is never held whole.
        """
        self._accumulate(self.weights)

    @staticmethod
    def _accumulate(weights: Iterable[Weight]) -> None:
        for weight in weights:
            if weight.copied and weight.parameter.grad is not None:
                gradient = weight.parameter.grad.to(weight.master.dtype)
                weight.master.grad = gradient if weight.master.grad is None else weight.master.grad.add_(gradient)
                weight.parameter.grad = None

    def sum_over_ranks(self) -> None:
        """Give every process that trains along the gradient of all; nothing where there is one."""
        if world_size() == 1:
            return
        self.accumulate()
        sum_gradients(weight.master for weight in self.weights)

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip, update the parameters, clear the gradients. Returns the global gradient norm before clipping.

        A parameter without a gradient is left alone, by the decay too. Raises ``NonFiniteError`` naming the parameter
        before any weight or moment changes; the gradients stay, ``zero_grad`` drops them.
        """
        portions = self._portions()
        norm = self._norm(portions)
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            self.accumulate()
            raise NonFiniteError(self._describe_non_finite())
        for group in self._adamw.param_groups:
            group["lr"] = lr
        for portion in portions:
            self._accumulate(portion)
            clip_grads_with_norm_([weight.master for weight in portion], self.settings.max_grad_norm, norm)
            self._adamw.step()  # those without a gradient, of the other portions, are left alone
            for weight in portion:
                if weight.copied:
                    weight.parameter.copy_(weight.master)
            self._drop(portion)
        return grad_norm

    def _portions(self) -> list[list[Weight]]:
        """What is stepped together: all, or, where gradients wait in half precision, some at a time: their float32
        copies would be as large as the masters."""
        if not all(weight.copied and weight.master.grad is None for weight in self.weights):
            self.accumulate()
            return [self.weights]
        portions: list[list[Weight]] = []
        room = 0
        for weight in self.weights:
            room -= weight.master.nbytes
            if room < 0 or not portions:
                portions.append([])
                room = PORTION_BYTES - weight.master.nbytes
            portions[-1].append(weight)
        return portions

    def _norm(self, portions: list[list[Weight]]) -> Tensor:
        """() global norm of the gradient, in float32 at least."""
        if len(portions) == 1:
            self._accumulate(portions[0])
            return gathered(get_total_norm([w.master.grad for w in portions[0] if w.master.grad is not None]))
        norms: list[Tensor] = []
        for portion in portions:
            for weight in portion:
                if (gradient := weight.parameter.grad) is not None:
                    norms.append(torch.linalg.vector_norm(gradient, dtype=weight.master.dtype))
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.tensor(0.0)

    def zero_grad(self) -> None:
        """Drop all gradients, summed or not."""
        self._drop(self.weights)

    @staticmethod
    def _drop(weights: Iterable[Weight]) -> None:
        for weight in weights:
            weight.parameter.grad = None
            weight.master.grad = None

    def bytes_to_come(self) -> int:
        """Memory that gradients and moments will take and do not take yet."""
        missing = [weight.master for weight in self.weights if not self._adamw.state.get(weight.master)]
        gradients = sum(weight.master.nbytes + weight.parameter.nbytes * weight.copied for weight in self.weights)
        return gradients + len(MOMENTS) * sum(master.nbytes for master in missing)

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
        for weight in self.weights:
            if weight.copied:
                tensors[f"{weight.name}.master"] = weight.master
            state = self._adamw.state.get(weight.master)
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
        states: dict[int, dict[str, Tensor]] = {}
        for index, weight in enumerate(self.weights):
            if weight.copied:
                weight.master.copy_(tensors[f"{weight.name}.master"])
                weight.parameter.copy_(weight.master)
            if weight.name in steps:
                moments = {moment: tensors[f"{weight.name}.{moment}"].clone() for moment in MOMENTS}
                states[index] = {"step": torch.tensor(float(steps[weight.name])), **moments}
        self._adamw.load_state_dict({"state": states, "param_groups": self._adamw.state_dict()["param_groups"]})
        self.zero_grad()

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
        gradients = [(w.name, gathered(w.master.grad)) for w in self.weights if w.master.grad is not None]
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


def _weight(name: str, parameter: nn.Parameter) -> Weight:
    return Weight(name, parameter, parameter.detach().float() if parameter.dtype in HALF else parameter)


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else "none"
