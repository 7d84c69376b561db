"""Decode steps of a few fused kernels instead of the model's own layers, where that is possible.

The layers stay the truth: what differs is which kernels compute them, and in which order sums are rounded. Whether the
kernels are used is chosen as ``policy/fused.py`` says.
"""

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medrl.policy import fused
from medrl.policy.policy import Policy
from medrl.rollout.decoder import Decoder, RowAttention
from medrl.rollout.rows import Prompts, Rows, begin
from medrl.rollout.sampling import Sampling

KERNELS = "medrl.rollout.kernels"


class FusedDecoder(Decoder):
    """A decoder whose steps go through ``rollout/kernels.py``; of fixed shape always."""

    def __init__(self, policy: Policy, sampling: Sampling, rows: Rows) -> None:
        super().__init__(policy, sampling, rows, static=True)
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
def differs(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, width: int) -> str | None:
    """Compare one attention of a few rows, random keys and prompts of two lengths, with the plain computation."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

    there = torch.arange(200, device=device) < torch.tensor([[150], [40]], device=device)
    prompts = Prompts(
        keys=draw(1, 2, kv_heads, 200, width), values=draw(1, 2, kv_heads, 200, width), padding=~there[:, None, None]
    )
    rows = begin(prompts, [151, 41], torch.zeros(6, 90, device=device))
    rows.keys.copy_(draw(*rows.keys.shape))
    rows.values.copy_(draw(*rows.values.shape))
    rows.t.copy_(torch.tensor([1, 2, 30, 64, 65, 90], device=device))
    query, key, value = draw(6, heads, 1, width), draw(6, kv_heads, 1, width), draw(6, kv_heads, 1, width)
    plain = RowAttention(rows).begin().attend(query, key, value, width**-0.5)  # keeps the keys, too
    kernels: Any = importlib.import_module(KERNELS)
    found = kernels.attend(query.squeeze(2), rows, 0, there.sum(1), width**-0.5)
    difference = float((found - plain.squeeze(2)).abs().max())
    if difference <= fused.TOLERANCE[dtype]:
        return None
    return f"the kernels give other numbers on this GPU (by {difference:.2g}, in attention)"
