"""AdamW in float32 whatever the weights are in, gradient clipping and the learning-rate schedule."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.adamw import adamw

from medrl.errors import CheckpointError, NonFiniteError
from medrl.settings import Settings
from medrl.training.distributed import gathered, sum_gradients, world_size

MOMENTS = ("exp_avg", "exp_avg_sq")
WIDENED = 2**28
"""Half-precision weights that are widened at a time while they are stepped: a gigabyte, or one parameter's."""


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


class Weight:
    """A parameter of the model, and what AdamW keeps of it.

    An update of 1e-6 is lost in the 8 bits of a bfloat16 weight near 1, so updates are summed in float32. A bfloat16
    number is the upper half of a float32 one: the parameter and the lower half, in 16 bits, together hold the sum, as
    in Split-SGD-BF16 (Kalamkar et al. 2019) and apex's ``store_param_remainders``.
    """

    def __init__(self, name: str, parameter: nn.Parameter) -> None:
        self.name, self.parameter = name, parameter
        self.halved = parameter.dtype == torch.bfloat16
        self.low = torch.zeros_like(parameter, dtype=torch.int16, requires_grad=False) if self.halved else None
        """What the parameter's bits leave out of the float32 weight's."""
        self.sum: Tensor | None = None
        """Float32, of a bfloat16 parameter's gradients; None where the parameter's own is the only one."""
        self.moments: dict[str, Tensor] = {}
        """Of ``MOMENTS``, and ``step``; empty before the first."""

    @property
    def gradient(self) -> Tensor | None:
        """The float32 sum where there is one, else the parameter's own."""
        return self.parameter.grad if self.sum is None else self.sum

    @property
    def full_bytes(self) -> int:
        """What the weight takes in the precision it is stepped in."""
        return self.parameter.nbytes * (2 if self.halved else 1)

    def master(self) -> Tensor:
        """What is stepped: a float32 tensor of its own for a bfloat16 parameter, else the parameter."""
        if self.low is None:
            return self.parameter
        return (self.parameter.detach().view(torch.int16).int() << 16).add_(self.low).view(torch.float32)

    @torch.no_grad()
    def set(self, master: Tensor) -> None:
        """Take a new value, rounded to the parameter's precision, with what rounding leaves out beside it.

        To the nearest, and from the middle up in size. (From the middle to the even one, as torch rounds, the halves
        would not tell which way it went.)
        """
        if self.low is None:
            self.parameter.copy_(master)
            return
        bits = master.float().view(torch.int32)
        high = (bits + 2**15).bitwise_right_shift_(16)
        self.parameter.view(torch.int16).copy_(high)
        self.low.copy_(high.bitwise_left_shift_(16).neg_().add_(bits))

    def moments_of(self, master: Tensor) -> dict[str, Tensor]:
        """Its moments, begun where there are none."""
        if not self.moments:
            # As torch.optim.AdamW has it: its fused kernel counts steps on the device.
            self.moments = {"step": torch.zeros((), device=master.device if master.is_cuda else "cpu")}
            self.moments |= {moment: torch.zeros_like(master) for moment in MOMENTS}
        return self.moments

    def add_gradient(self, parameter: Tensor) -> None:
        """Move the parameter's new gradient into the sum."""
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        self.sum = gradient if self.sum is None else self.sum.add_(gradient)
        parameter.grad = None

    def drop_gradient(self) -> None:
        self.parameter.grad = self.sum = None


class AdamW:
    """``torch.optim.AdamW``, in float32 also for bfloat16 parameters (``Weight``).

    Parameters in float32 or float64 are stepped as they are.
    """

    def __init__(self, parameters: Iterable[tuple[str, nn.Parameter]], settings: Optim) -> None:
        """``parameters`` as from ``model.named_parameters()``; frozen ones are left out, tied ones are taken once."""
        self.settings = settings
        distinct = {id(parameter): (name, parameter) for name, parameter in reversed(list(parameters))}
        weights = [Weight(*named) for named in reversed(distinct.values()) if named[1].requires_grad]
        self.weights = sorted(weights, key=lambda weight: weight.parameter.ndim < 2)  # matrices first, which decay

    @contextmanager
    def summing(self) -> Iterator[None]:
        """Within, ``backward`` adds half-precision gradients to float32 sums, each as soon as it is made, and drops it.

        For a step that is cut into micro-batches, or over ranks: sums kept in bfloat16 would depend on the cut. A step
        that is neither needs no sums, and has no memory taken for them.
        """
        hooks = [
            weight.parameter.register_post_accumulate_grad_hook(weight.add_gradient)
            for weight in self.weights
            if weight.halved
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def sum_over_ranks(self) -> None:
        """Give every process that trains along the gradient of all; nothing where there is one."""
        if world_size() == 1:
            return
        sums = sum_gradients(
            [weight.gradient for weight in self.weights], lambda place: torch.zeros_like(self.weights[place].master())
        )
        for weight, gradient in zip(self.weights, sums, strict=True):
            if weight.halved:
                weight.sum = gradient
            else:
                weight.parameter.grad = gradient

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """Clip, update the parameters, clear the gradients. Returns the global gradient norm before clipping.

        A parameter without a gradient is left alone, by the decay too. Raises ``NonFiniteError`` naming the parameter
        before any weight or moment changes; the gradients stay, ``zero_grad`` drops them. Weights are stepped a part
        after another: after any other error some have moved, and the state is to be loaded anew.
        """
        norm = self._norm()
        grad_norm = float(norm)
        if not math.isfinite(grad_norm):
            raise NonFiniteError(self._describe_non_finite())
        for part in _divide([weight for weight in self.weights if weight.gradient is not None]):
            self._step(part, lr, norm)
        return grad_norm

    def _step(self, weights: Sequence[Weight], lr: float, norm: Tensor) -> None:
        """Clip, given the ``norm`` of all gradients, update, and clear the gradients."""
        masters = [weight.master() for weight in weights]
        for weight, master in zip(weights, masters, strict=True):
            gradient = weight.gradient
            assert gradient is not None
            weight.drop_gradient()
            master.grad = gradient.to(master.dtype)
        clip_grads_with_norm_(masters, self.settings.max_grad_norm, norm)
        for decays in (True, False):
            group = [pair for pair in zip(weights, masters, strict=True) if (pair[1].ndim >= 2) == decays]
            if group:
                _adamw(group, lr, self.settings.weight_decay if decays else 0.0, self.settings)
        for weight, master in zip(weights, masters, strict=True):
            master.grad = None
            if weight.halved:
                weight.set(master)

    def _norm(self) -> Tensor:
        """Of all gradients together."""
        gradients = [gradient for weight in self.weights if (gradient := weight.gradient) is not None]
        if not any(gradient.dtype == torch.bfloat16 for gradient in gradients):
            return gathered(get_total_norm(gradients))
        # get_total_norm's norms would be rounded to half precision.
        norms = torch._foreach_norm(gradients, 2.0, dtype=torch.float32)  # pyright: ignore[reportPrivateImportUsage]
        return torch.linalg.vector_norm(torch.stack(norms))

    def zero_grad(self) -> None:
        """Drop all gradients, summed or not."""
        for weight in self.weights:
            weight.drop_gradient()

    def moments_to_come(self) -> int:
        """Bytes that moments will take and do not take yet."""
        return len(MOMENTS) * sum(weight.full_bytes for weight in self.weights if not weight.moments)

    def bytes_of_sums(self) -> int:
        """What the float32 sums of half-precision gradients take in a step that is cut."""
        return sum(weight.full_bytes for weight in self.weights if weight.halved)

    def bytes_saved(self) -> int:
        """What ``state_dict`` will hold once every parameter has been stepped."""
        return sum(weight.full_bytes * (len(MOMENTS) + weight.halved) for weight in self.weights)

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """All that the model's own weights do not hold: tensors for safetensors, and integers for JSON.

        The tensors are ``<parameter>.exp_avg`` and ``<parameter>.exp_avg_sq``, the live ones, not copies; and for
        half-precision parameters ``<parameter>.master``, in float32. The integers are the steps each has taken.
        """
        tensors: dict[str, Tensor] = {}
        steps: dict[str, int] = {}
        for weight in self.weights:
            if weight.halved:
                tensors[f"{weight.name}.master"] = weight.master()
            if weight.moments:
                steps[weight.name] = int(weight.moments["step"])
                tensors |= {f"{weight.name}.{moment}": weight.moments[moment] for moment in MOMENTS}
        return tensors, steps

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Continue exactly where ``state_dict`` was taken; half-precision parameters are set from their masters.

        Raises ``CheckpointError``, before anything changes, for state that is not of these parameters.
        """
        self._check_fits(tensors, steps)
        for weight in self.weights:
            if weight.halved:
                weight.set(tensors[f"{weight.name}.master"])
            weight.moments = {}
            if weight.name in steps:
                moments = weight.moments_of(weight.master())
                moments["step"].fill_(steps[weight.name])
                for moment in MOMENTS:
                    moments[moment].copy_(tensors[f"{weight.name}.{moment}"])
        self.zero_grad()

    def _check_fits(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        expected: dict[str, Weight] = {}
        for weight in self.weights:
            kinds = (["master"] if weight.halved else []) + (list(MOMENTS) if weight.name in steps else [])
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
            if tensors[name].shape != weight.parameter.shape:
                raise CheckpointError(
                    f"the optimizer state has {name} of shape {tuple(tensors[name].shape)}, but the parameter has "
                    f"{tuple(weight.parameter.shape)}; resume with the model the checkpoint was saved with"
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


def _adamw(group: Sequence[tuple[Weight, Tensor]], lr: float, decay: float, settings: Optim) -> None:
    """One AdamW step of masters that have gradients."""
    moments = [weight.moments_of(master) for weight, master in group]
    adamw(
        [master for _, master in group],
        [master.grad for _, master in group if master.grad is not None],
        *([each[name] for each in moments] for name in MOMENTS),
        max_exp_avg_sqs=[],
        state_steps=[each["step"] for each in moments],
        fused=True if all(master.is_cuda for _, master in group) else None,  # one kernel, and no temporaries
        amsgrad=False,
        beta1=settings.betas[0],
        beta2=settings.betas[1],
        lr=lr,
        weight_decay=decay,
        eps=settings.eps,
        maximize=False,
    )


def _divide(weights: Sequence[Weight]) -> list[list[Weight]]:
    """In parts of at most ``WIDENED`` numbers where gradients are widened; in one where they are not."""
    parts: list[list[Weight]] = []
    room = 0
    for weight in weights:
        size = weight.parameter.numel() if weight.halved else 0
        if not parts or size > room:
            parts.append([])
            room = WIDENED
        parts[-1].append(weight)
        room -= size
    return parts


def _listed(names: list[str]) -> str:
    return f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}" if names else "none"
