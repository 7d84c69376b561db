"""Decode steps of a few fused kernels instead of the model's own layers, where that is possible.

The layers stay the truth: what differs is which kernels compute them, and in which order sums are rounded. Whether the
kernels are used is chosen as ``policy/fused.py`` says.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from itertools import cycle, islice
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.policy import fused
from medrl.policy.policy import Policy
from medrl.rollout.decoder import RowAttention, Stepper
from medrl.rollout.rows import Prompts, Rows, begin
from medrl.rollout.sampling import Sampling

KERNELS = "medrl.rollout.kernels"
COMPARED = (1, 3, 12)
"""Completions per prompt that kernels are compared with: how many queries share its keys decides what they are compiled
to. An evaluation has one; with 12, every model asks more than one program answers, or as much as that."""

Draw = Callable[..., Tensor]
"""Random numbers of a shape."""
Pairs = list[tuple[Tensor, Tensor]]
"""What a kernel made of random numbers, and what the plain computation does."""


class FusedDecoder(Stepper):
    """Steps through ``rollout/kernels.py``; of fixed shape always."""

    def __init__(self, policy: Policy, sampling: Sampling, rows: Rows) -> None:
        super().__init__(policy, sampling, rows)
        self.kernels: Any = importlib.import_module(KERNELS)  # it needs Triton, which is not everywhere
        self.layers = [_Layer(layer) for layer in policy.family.layers]

    def hidden(self) -> Tensor:
        family, rows, kernels = self.policy.family, self.rows, self.kernels
        prompt_lengths = (~rows.prompts.padding).sum((1, 2, 3))  # (N,)
        angles = family.angles(rows.first + rows.t - 1)
        hidden = family.embed(rows.tokens)  # (R, H)
        delta: Tensor | None = None
        for number, layer in enumerate(self.layers):
            query, key, value = layer.attention_inputs(kernels.add_norm(hidden, delta, *layer.norms[0]))
            query = kernels.rotate(query, key, value, angles, rows.t, rows.keys[number], rows.values[number])
            attended = kernels.attend(query, rows, number, prompt_lengths, layer.scale)
            delta = layer.attention_output(attended.flatten(1))
            gate, up = layer.mlp_inputs(kernels.add_norm(hidden, delta, *layer.norms[1]))
            delta = layer.mlp_output(kernels.gated(gate, up))
        return kernels.add_norm(hidden, delta, *_norm(family.final_norm))


class _Layer:
    """A decoder layer as a step reads it."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.norms = (_norm(layer.input_layernorm), _norm(layer.post_attention_layernorm))
        self.attention_inputs = Together([attention.q_proj, attention.k_proj, attention.v_proj])
        self.attention_output, self.scale = attention.o_proj, attention.scaling
        self.mlp_inputs, self.mlp_output = Together([mlp.gate_proj, mlp.up_proj]), mlp.down_proj


def _norm(module: Any) -> tuple[Tensor, float]:
    return module.weight, module.variance_epsilon


class Together:
    """Linear modules that read the same input, as one product: a small one leaves most of a GPU idle.

    For that their weights move behind each other in memory, once. They stay the modules' parameters, equal and apart:
    training, saving and loading see no difference. Modules of another kind (with adapters) are called one by one.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self.modules = modules
        self.weight: Tensor | None = None
        self.bias: Tensor | None = None
        if all(type(module) is nn.Linear for module in modules):
            self.widths = [module.out_features for module in modules]
            self.weight = _put_together([module.weight for module in modules])
            if all(module.bias is not None for module in modules):
                self.bias = _put_together([module.bias for module in modules])
            elif any(module.bias is not None for module in modules):
                self.weight = None

    def __call__(self, x: Tensor) -> Sequence[Tensor]:
        """(R, K) -> (R, N) of every module."""
        if self.weight is None:
            return [module(x) for module in self.modules]
        return F.linear(x, self.weight, self.bias).split(self.widths, dim=-1)


def _put_together(parameters: Sequence[nn.Parameter]) -> Tensor:
    """One tensor of which the parameters are the parts, along the first axis; that of before where they are already."""
    first, rows = parameters[0].data, sum(len(parameter) for parameter in parameters)
    at = first.data_ptr()
    for parameter in parameters:
        if parameter.data_ptr() != at or parameter.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            break
        at += parameter.nbytes
    else:
        return first.as_strided((rows, *first.shape[1:]), first.stride())
    together = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, together.split([len(parameter) for parameter in parameters]), strict=True):
        parameter.data = part
    return together


def decodes_fused(policy: Policy) -> bool:
    """Whether this policy decodes with the fused kernels, as ``policy.kernels`` wants: ``auto`` where they work.

    Chosen and logged when asked first. Raises ``PolicyError`` where they are asked for and cannot be had.
    """
    if policy.decodes_fused is None:
        wanted, device = policy.kernels, policy.device
        asked = wanted is True or (wanted == "auto" and device.type == "cuda")
        policy.decodes_fused = fused.choose("decoding", wanted, device, obstacle(policy) if asked else None)
    return policy.decodes_fused


def obstacle(policy: Policy) -> str | None:
    """Why a policy cannot decode with the fused kernels; None where it can."""
    _, kv_heads, width = policy.family.cache_shape
    dtype = policy.family.head.dtype
    problem = fused.obstacle(policy.device, dtype) or policy.family.not_fusable
    if problem is not None:
        return problem
    if width < 16 or width & (width - 1):
        return f"the kernels need heads whose width is a power of two and at least 16, not {width}"
    return differs(policy.device, dtype, policy.family.query_heads, kv_heads, width)


@cache
@fused.or_why_not_built
def differs(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> str | None:
    """Compare what every kernel makes of a few random rows with the plain computation."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    kernels: Any = importlib.import_module(KERNELS)
    compared = {
        "norms": _norms(kernels, draw, heads * width),
        "rotation": _rotation(kernels, draw, heads, kv_heads, width),
        "activation": _activation(kernels, draw),
        "attention": [pair for size in COMPARED for pair in _attention(kernels, draw, heads, kv_heads, width, size)],
    }
    for name, pairs in compared.items():
        difference = max(_difference(found, plain) for found, plain in pairs)
        if not difference <= fused.TOLERANCE[dtype]:
            return f"the kernels give other numbers on this GPU (by {difference:.2g}, in {name})"
    return None


def _difference(found: Tensor, plain: Tensor) -> float:
    """The largest one, of numbers above 1 as a share of them: that is how rounding goes."""
    return float(((found.float() - plain.float()).abs() / plain.float().abs().clamp(min=1)).nan_to_num(torch.inf).max())


def _norms(kernels: Any, draw: Draw, width: int) -> Pairs:
    hidden, delta, weight = draw(3, width), draw(3, width), draw(width)
    total = hidden + delta
    plain = F.rms_norm(total.float(), (width,), weight.float(), 1e-6).to(total.dtype)
    of_sum = kernels.add_norm(hidden, delta, weight, 1e-6)  # and the sum is in ``hidden``
    return [(of_sum, plain), (hidden, total), (kernels.add_norm(total, None, weight, 1e-6), plain)]


def _rotation(kernels: Any, draw: Draw, heads: int, kv_heads: int, width: int) -> Pairs:
    query, key, value = draw(3, (heads + 2 * kv_heads) * width).split(
        [n * width for n in (heads, kv_heads, kv_heads)], 1
    )
    keys, values = draw(3, kv_heads, 5, width), draw(3, kv_heads, 5, width)
    angle = draw(3, width // 2)
    cos, sin = angle.cos(), angle.sin()
    row, t = torch.arange(3, device=query.device), torch.tensor([1, 5, 2], device=query.device)

    def turn(x: Tensor) -> Tensor:
        a, b = x.float().view(3, -1, 2, width // 2).unbind(2)
        c, s = cos.float()[:, None], sin.float()[:, None]
        return torch.cat([a * c - b * s, b * c + a * s], -1).to(x.dtype)

    kept_keys, kept_values = keys.clone(), values.clone()
    kept_keys[row, :, t - 1], kept_values[row, :, t - 1] = turn(key), value.view(3, kv_heads, width)
    rotated = kernels.rotate(query, key, value, (cos, sin), t, keys, values)
    return [(rotated, turn(query)), (keys, kept_keys), (values, kept_values)]


def _activation(kernels: Any, draw: Draw) -> Pairs:
    gate, up = draw(3, 2 * (kernels.GATED + 5)).chunk(2, dim=1)
    return [(kernels.gated(gate, up), (F.silu(gate.float()) * up.float()).to(gate.dtype))]


def _attention(kernels: Any, draw: Draw, heads: int, kv_heads: int, width: int, group_size: int) -> Pairs:
    """Rows that have written much and little, behind prompts of two lengths."""
    keys, values = draw(1, 2, kv_heads, 200, width), draw(1, 2, kv_heads, 200, width)
    device, count = keys.device, 2 * group_size
    there = torch.arange(200, device=device) < torch.tensor([[150], [40]], device=device)
    prompts = Prompts(keys=keys, values=values, padding=~there[:, None, None])
    rows = begin(prompts, [151, 41], torch.zeros(count, 90, device=device))
    rows.keys.copy_(draw(*rows.keys.shape))
    rows.values.copy_(draw(*rows.values.shape))
    rows.t.copy_(torch.tensor(list(islice(cycle([90, 1, 65, 2, 64, 30]), count)), device=device))
    query, key, value = draw(count, heads, 1, width), draw(count, kv_heads, 1, width), draw(count, kv_heads, 1, width)
    plain = RowAttention(rows).begin().attend(query, key, value, width**-0.5)  # keeps the keys, too
    return [(kernels.attend(query.squeeze(2), rows, 0, there.sum(1), width**-0.5), plain.squeeze(2))]
