"""Packed attention without a mask: what a completion sees of its prompt and of itself, computed apart and merged.

A prompt sees only itself, and so does a completion but for its prompt. So the stream is a row of causal segments, and
every completion token has one more set of keys, its whole prompt: all completions of a group ask their prompt in one
call, and the prompt's keys are read once and never copied. Softmax over the union of two sets of keys is the mean of
the two softmaxes, weighted by their sums (log-sum-exp); the gradient of each part needs only the merged output and
the merged log-sum-exp. Source: Milakov & Gimelshein 2018, arXiv 1805.02867; for shared prefixes Juravsky et al. 2024
(Hydragen), arXiv 2402.05099; the gradient as in ring attention, Liu et al. 2023, arXiv 2310.01889.

The kernels are torch's own flash kernels, for CUDA (half precision) and for the CPU (any precision).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from medrl.policy.layout import Layout
from medrl.policy.transfer import bring

HALF = (torch.float16, torch.bfloat16)
Grads = tuple[Tensor, Tensor, Tensor]
aten: Any = torch.ops.aten


class VarlenPacked:
    """A packed stream of N groups as causal segments, and completions that also ask their prompt."""

    def __init__(self, layout: Layout) -> None:
        device = layout.group.device
        segments: list[int] = []  # lengths, in the order of the stream; empty ones left out
        prompts: list[slice] = []  # of the groups that have completion tokens
        suffixes: list[slice] = []
        completions: list[tuple[int, int]] = []  # start, length
        start, rows = 0, iter(layout.completion_lengths)
        for length, prompt, size in zip(layout.group_lengths, layout.prompt_lengths, layout.group_sizes, strict=True):
            inside = [next(rows) - 1 for _ in range(size)]
            segments += [prompt, *(n for n in inside if n)]
            if length > prompt:
                prompts.append(slice(start, start + prompt))
                suffixes.append(slice(start + prompt, start + length))
            at = start + prompt
            for n in inside:
                completions += [(at, n)] if n else []
                at += n
            start += length
        self.plan = Plan(
            segments=Spans.of(segments, device),
            prompts=Spans.of([part.stop - part.start for part in prompts], device),
            suffixes=Spans.of([part.stop - part.start for part in suffixes], device),
            prompt_index=_indices(prompts, device),
            suffix_index=_indices(suffixes, device),
            prompt_slices=_prompt_slices(layout),
            completions=_padded(completions) if device.type == "cpu" else None,
        )

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return _Merged.apply(query[0], key[0], value[0], scale, self.plan)[None]  # type: ignore[index]


@dataclass(frozen=True, slots=True)
class Spans:
    """Sequences end to end, as the CUDA kernels want them described."""

    lengths: tuple[int, ...]
    ends: Tensor
    """(sequences + 1,) int32: 0, and where each ends."""
    longest: int

    @classmethod
    def of(cls, lengths: list[int], device: torch.device) -> "Spans":
        ends = torch.tensor([0, *lengths]).cumsum(0).int()
        return cls(tuple(lengths), bring(ends, device), max(lengths, default=0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Where the segments of a stream are. Prompts and suffixes: of the groups that have completion tokens."""

    segments: Spans
    prompts: Spans
    suffixes: Spans
    prompt_index: Tensor
    suffix_index: Tensor
    prompt_slices: tuple[slice, ...]
    """Of all groups."""
    completions: tuple[Tensor, Tensor] | None
    """On a CPU, (R, longest) places, and whether there is a token; padding repeats a completion's first token."""


def _prompt_slices(layout: Layout) -> tuple[slice, ...]:
    starts = [sum(layout.group_lengths[:n]) for n in range(len(layout.group_lengths))]
    return tuple(slice(start, start + p) for start, p in zip(starts, layout.prompt_lengths, strict=True))


def _indices(parts: list[slice], device: torch.device) -> Tensor:
    if not parts:
        return torch.empty(0, dtype=torch.long, device=device)
    return bring(torch.cat([torch.arange(part.start, part.stop) for part in parts]), device)


def _padded(spans: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    starts = torch.tensor([start for start, _ in spans], dtype=torch.long)[:, None]
    lengths = torch.tensor([length for _, length in spans], dtype=torch.long)[:, None]
    inside = torch.arange(int(lengths.max()) if spans else 0)
    there = inside < lengths
    return (starts + inside).where(there, starts), there


class Kernel(Protocol):
    """The two parts of packed attention and their gradients. Tensors are (heads, T, D); log-sum-exps (heads, T)."""

    def own(self, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Plan) -> tuple[Tensor, Tensor]:
        """Every segment alone, causal: output and log-sum-exp of all T tokens."""
        ...

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Plan) -> tuple[Tensor, Tensor]:
        """The S completion tokens against their prompts: (heads, S, D), (heads, S)."""
        ...

    def own_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, plan: Plan
    ) -> Grads:
        """Gradients of all T queries, keys and values, as far as they go through ``own``."""
        ...

    def prompt_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, plan: Plan
    ) -> Grads:
        """Gradients of S queries, and of the prompts' keys and values, as far as they go through ``prompt``."""
        ...


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, plan: Plan) -> Tensor:
        kernel = KERNELS[query.device.type]
        out, lse = kernel.own(query, key, value, scale, plan)
        suffix = plan.suffix_index
        if len(suffix):
            far, far_lse = kernel.prompt(query, key, value, scale, plan)
            near, near_lse = out[:, suffix], lse[:, suffix]
            both = torch.logaddexp(near_lse, far_lse)
            share = (near_lse - both).exp()[..., None]
            out[:, suffix] = (share * near + (far_lse - both).exp()[..., None] * far).to(out.dtype)
            lse[:, suffix] = both
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.scale, ctx.plan = scale, plan
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        kernel = KERNELS[grads[0].device.type]
        query, key, value, out, lse = ctx.saved_tensors
        grad, scale, plan = grads[0].contiguous(), ctx.scale, ctx.plan
        grad_query, grad_key, grad_value = kernel.own_backward(grad, query, key, value, out, lse, scale, plan)
        if len(plan.suffix_index):
            far_q, far_k, far_v = kernel.prompt_backward(grad, query, key, value, out, lse, scale, plan)
            grad_query.index_add_(1, plan.suffix_index, far_q)
            grad_key.index_add_(1, plan.prompt_index, far_k)
            grad_value.index_add_(1, plan.prompt_index, far_v)
        return grad_query, grad_key, grad_value, None, None


class CpuKernel:
    """Prompt by prompt and all completions at once, through the flash kernel that torch has for CPUs."""

    def own(self, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Plan) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty_like(q, memory_format=torch.contiguous_format), _lse_like(q)
        k, v = _repeat(k, q), _repeat(v, q)
        for part in plan.prompt_slices:
            o, sums = _cpu_forward(q[None, :, part], k[None, :, part], v[None, :, part], scale, causal=True)
            out[:, part], lse[:, part] = o[0], sums[0]
        assert plan.completions is not None
        index, there = plan.completions
        if index.numel():
            padded_q, padded_k, padded_v = (x[:, index].transpose(0, 1) for x in (q, k, v))
            o, sums = _cpu_forward(padded_q, padded_k, padded_v, scale, causal=True)
            place = index[there]
            out[:, place], lse[:, place] = o.transpose(0, 1)[:, there], sums.transpose(0, 1)[:, there]
        return out, lse

    def own_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, plan: Plan
    ) -> Grads:
        keys, values = _repeat(k, q), _repeat(v, q)
        tensors = (grad, q, keys, values, out)
        found = tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, keys, values))
        for part in plan.prompt_slices:
            here = _cpu_backward([x[None, :, part] for x in tensors], lse[None, :, part], scale, causal=True)
            for total, share in zip(found, here, strict=True):
                total[:, part] = share[0]
        assert plan.completions is not None
        index, there = plan.completions
        if index.numel():
            padded = [x[:, index].transpose(0, 1) for x in tensors]
            padded[0] = padded[0] * there[:, None, :, None]  # what is padding has no gradient to give
            here = _cpu_backward(padded, lse[:, index].transpose(0, 1), scale, causal=True)
            for total, share in zip(found, here, strict=True):
                total[:, index[there]] = share.transpose(0, 1)[:, there]
        grad_query, grad_key, grad_value = found
        return grad_query, _sum_shared(grad_key, k), _sum_shared(grad_value, v)

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Plan) -> tuple[Tensor, Tensor]:
        parts = []
        for asked, suffix, prompt in _groups(plan):
            o, sums = _cpu_forward(_fold(q[:, suffix], k), k[None, :, prompt], v[None, :, prompt], scale, causal=False)
            parts.append((o.reshape(len(q), asked, -1), sums.reshape(len(q), asked)))
        return torch.cat([o for o, _ in parts], dim=1), torch.cat([sums for _, sums in parts], dim=1)

    def prompt_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, plan: Plan
    ) -> Grads:
        parts = []
        for asked, suffix, prompt in _groups(plan):
            sums = lse[:, suffix].reshape(1, len(k), -1)
            asking = [_fold(x[:, suffix], k) for x in (grad, q, out)]
            tensors = [*asking[:2], k[None, :, prompt], v[None, :, prompt], asking[2]]
            dq, dk, dv = _cpu_backward(tensors, sums, scale, causal=False)
            parts.append((dq.reshape(len(q), asked, -1), dk[0], dv[0]))
        grad_query, grad_key, grad_value = (torch.cat(share, dim=1) for share in zip(*parts, strict=True))
        return grad_query, grad_key, grad_value


def _groups(plan: Plan) -> list[tuple[int, slice, slice]]:
    """Of each group with completion tokens: how many there are, where they are, where its prompt is."""
    asking = zip(plan.suffixes.lengths, plan.prompts.lengths, strict=True)
    at, prompt_at, found = 0, 0, []
    for asked, length in asking:
        first = int(plan.suffix_index[at])
        prompt = int(plan.prompt_index[prompt_at])
        found.append((asked, slice(first, first + asked), slice(prompt, prompt + length)))
        at, prompt_at = at + asked, prompt_at + length
    return found


def _fold(x: Tensor, k: Tensor) -> Tensor:
    """(heads, S, D) -> (1, kv_heads, heads per key head * S, D): heads that share keys become rows of one query."""
    return x.reshape(1, len(k), -1, x.shape[-1])


def _repeat(x: Tensor, q: Tensor) -> Tensor:
    """(kv_heads, T, D) -> (heads, T, D)."""
    return x if len(x) == len(q) else x.repeat_interleave(len(q) // len(x), dim=0)


def _sum_shared(grad: Tensor, k: Tensor) -> Tensor:
    """(heads, T, D) gradients of repeated heads -> (kv_heads, T, D)."""
    return grad if len(grad) == len(k) else grad.view(len(k), -1, *grad.shape[1:]).sum(1)


def _lse_like(q: Tensor) -> Tensor:
    return torch.empty(q.shape[:2], dtype=torch.float32 if q.dtype in HALF else q.dtype, device=q.device)


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, *, causal: bool) -> tuple[Tensor, Tensor]:
    return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)


def _cpu_backward(tensors: Sequence[Tensor], lse: Tensor, scale: float, *, causal: bool) -> Grads:
    """``tensors``: gradient, query, key, value, output."""
    grad, q, k, v, out = tensors
    return aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, k, v, out, lse.contiguous(), 0.0, causal, scale=scale
    )


class CudaKernel:
    """One call of the flash kernel for all segments, one for all completion tokens against their prompts."""

    def own(self, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Plan) -> tuple[Tensor, Tensor]:
        return _cuda_forward(q, k, v, plan.segments, plan.segments, scale, causal=True)

    def own_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, plan: Plan
    ) -> Grads:
        return _cuda_backward(grad, q, k, v, out, lse, plan.segments, plan.segments, scale, causal=True)

    def prompt(self, q: Tensor, k: Tensor, v: Tensor, scale: float, plan: Plan) -> tuple[Tensor, Tensor]:
        k, v = k[:, plan.prompt_index], v[:, plan.prompt_index]
        return _cuda_forward(q[:, plan.suffix_index], k, v, plan.suffixes, plan.prompts, scale, causal=False)

    def prompt_backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, scale: float, plan: Plan
    ) -> Grads:
        grad, q, out = (x[:, plan.suffix_index] for x in (grad, q, out))
        k, v = k[:, plan.prompt_index], v[:, plan.prompt_index]
        lse = lse[:, plan.suffix_index]
        return _cuda_backward(grad, q, k, v, out, lse, plan.suffixes, plan.prompts, scale, causal=False)


def _cuda_forward(
    q: Tensor, k: Tensor, v: Tensor, asked: Spans, keys: Spans, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    out, lse, *_ = aten._flash_attention_forward(
        *(x.transpose(0, 1) for x in (q, k, v)),
        asked.ends, keys.ends, asked.longest, keys.longest, 0.0, causal, False, scale=scale,
    )  # fmt: skip
    return out.transpose(0, 1), lse


def _cuda_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, asked: Spans, keys: Spans, scale: float,
    *, causal: bool,
) -> Grads:  # fmt: skip
    nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)  # dropout RNG state, unused: dropout is 0
    found = aten._flash_attention_backward(
        *(x.transpose(0, 1).contiguous() for x in (grad, q, k, v, out)), lse.contiguous(),
        asked.ends, keys.ends, asked.longest, keys.longest, 0.0, causal, nothing, nothing.new_empty(0), scale=scale,
    )  # fmt: skip
    grad_query, grad_key, grad_value = (x.transpose(0, 1) for x in found)
    return grad_query, grad_key, grad_value


KERNELS: dict[str, Kernel] = {"cpu": CpuKernel(), "cuda": CudaKernel()}
