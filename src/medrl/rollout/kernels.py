"""Triton kernels of a decode step: all of it but the matrix products.

A decode step of a 2B model reads its weights in about 1 ms and launches a thousand kernels of a few microseconds each
around that. These few take their place: a residual sum with its norm; rotary positions, written straight to where keys
and values are kept; attention, which reads a prompt once for all rows that ask it and, of a row's own tokens, only
those that are there; the gated activation. Sums are in float32, results are rounded once.

Attention of one token has two parts, merged by their log-sum-exps (Juravsky et al. 2024, Hydragen, arXiv 2402.05099),
the prompt's in pieces so that there is work for the whole GPU (Dao et al. 2023, Flash-Decoding).
"""

# To a type checker Triton's language is not Python, and Triton is not everywhere.
# pyright: reportMissingImports=false, reportCallIssue=false, reportArgumentType=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from medrl.rollout.rows import Rows

CHUNK = {2: 128, 4: 32}
"""Bytes of a number -> tokens of a prompt that one program reads: as many as its registers hold."""
OWN = 64
"""A row's own tokens that one program reads at a time."""
QUERIES = 64
"""Queries, of all rows and heads that share a prompt's keys, that one program answers at most."""
LEAST = 16
"""Queries that the matrix units want at least; what is missing is filled up."""
GATED = 1024
"""Elements of a gated activation for one program."""


@triton.jit
def _add_norm(hidden, delta, weight, normed, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    x = tl.load(hidden + row * width + at, mask=inside, other=0.0)
    if ADD:
        more = tl.load(delta + row * width + at, mask=inside, other=0.0)
        x = (x.to(tl.float32) + more.to(tl.float32)).to(x.dtype)
        tl.store(hidden + row * width + at, x, mask=inside)
    wide = x.to(tl.float32)
    wide = wide * tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    scaled = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) * wide
    tl.store(normed + row * width + at, scaled.to(x.dtype), mask=inside)


def add_norm(hidden: Tensor, delta: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm of ``hidden + delta``, all (R, H); the sum is left in ``hidden``. Source: Zhang & Sennrich 2019."""
    rows, width = hidden.shape
    normed = torch.empty_like(hidden)
    _add_norm[(rows,)](
        hidden, hidden if delta is None else delta, weight, normed, width, eps,
        ADD=delta is not None, BLOCK=triton.next_power_of_2(width), num_warps=8,
    )  # fmt: skip
    return normed


@triton.jit
def _rotate(
    query, key, value, query_step, key_step, value_step, cos, sin, t, rotated, keys, values, limit,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    at = tl.arange(0, HALF)
    width = 2 * HALF
    c = tl.load(cos + row * HALF + at).to(tl.float32)
    s = tl.load(sin + row * HALF + at).to(tl.float32)
    slot = tl.load(t + row) - 1
    if head < HEADS:
        source = query + row * query_step + head * width
        target = rotated + (row * HEADS + head) * width
        a, b = tl.load(source + at).to(tl.float32), tl.load(source + HALF + at).to(tl.float32)
        tl.store(target + at, (a * c - b * s).to(rotated.dtype.element_ty))
        tl.store(target + HALF + at, (b * c + a * s).to(rotated.dtype.element_ty))
    elif head < HEADS + KV_HEADS:
        source = key + row * key_step + (head - HEADS) * width
        target = keys + ((row * KV_HEADS + head - HEADS) * limit + slot) * width
        a, b = tl.load(source + at).to(tl.float32), tl.load(source + HALF + at).to(tl.float32)
        tl.store(target + at, (a * c - b * s).to(keys.dtype.element_ty))
        tl.store(target + HALF + at, (b * c + a * s).to(keys.dtype.element_ty))
    else:
        source = value + row * value_step + (head - HEADS - KV_HEADS) * width
        target = values + ((row * KV_HEADS + head - HEADS - KV_HEADS) * limit + slot) * width
        tl.store(target + at, tl.load(source + at))
        tl.store(target + HALF + at, tl.load(source + HALF + at))


def rotate(
    query: Tensor, key: Tensor, value: Tensor, angles: tuple[Tensor, Tensor], t: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Give one token of every row its rotary position and keep its key and value.

    Args:
        query: (R, heads * D); ``key`` and ``value`` (R, kv_heads * D); rows may be apart.
        angles: cosine and sine (R, D / 2).
        t: (R,) tokens of each row, this one included.
        keys: (R, kv_heads, C, D) of this layer, where the key is written; ``values`` likewise.

    Returns:
        (R, heads, D) rotated queries.
    """
    rows, kv_heads, limit, width = keys.shape
    heads = query.shape[1] // width
    rotated = torch.empty(rows, heads, width, dtype=query.dtype, device=query.device)
    _rotate[(rows, heads + 2 * kv_heads)](
        query, key, value, query.stride(0), key.stride(0), value.stride(0), *angles, t, rotated, keys, values, limit,
        HEADS=heads, KV_HEADS=kv_heads, HALF=width // 2, num_warps=1,
    )  # fmt: skip
    return rotated


@triton.jit
def _ask_prompt(
    query, keys, values, lengths, table, part_out, part_sum, scale, prompt_tokens, group_size, shared, chunks, heads,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    chunk = tl.program_id(0)
    kv_head = tl.program_id(1) % KV_HEADS
    first = tl.program_id(1) // KV_HEADS * QUERIES
    prompt = tl.program_id(2).to(tl.int64)
    length = tl.load(lengths + prompt)
    asking = first + tl.arange(0, QUERIES)
    there = asking < group_size * shared
    here = ((prompt * KV_HEADS + kv_head) * chunks + chunk) * group_size * shared + asking
    if chunk * CHUNK < length:
        d = tl.arange(0, WIDTH)
        k = chunk * CHUNK + tl.arange(0, CHUNK)
        row = tl.load(table + prompt * group_size + asking // shared, mask=there, other=0)
        head = row * heads + kv_head * shared + asking % shared
        q = tl.load(query + head[:, None] * WIDTH + d[None, :], mask=there[:, None], other=0.0)
        at = ((prompt * KV_HEADS + kv_head) * prompt_tokens + k)[:, None] * WIDTH + d[None, :]
        key = tl.load(keys + at, mask=(k < length)[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where((k < length)[None, :], scores, float("-inf"))
        largest = tl.max(scores, 1)
        weights = tl.exp(scores - largest[:, None])
        total = tl.sum(weights, 1)
        value = tl.load(values + at, mask=(k < length)[:, None], other=0.0)
        out = tl.dot(weights.to(value.dtype), value, input_precision="ieee") / total[:, None]
        tl.store(part_out + here[:, None] * WIDTH + d[None, :], out, mask=there[:, None])
        tl.store(part_sum + here, largest + tl.log(total), mask=there)
    else:
        tl.store(part_sum + here, tl.full([QUERIES], float("-inf"), tl.float32), mask=there)


@triton.jit
def _ask_own(
    query, keys, values, t, place, part_out, part_sum, attended, scale, limit, group_size, chunks,
    KV_HEADS: tl.constexpr, SHARED: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, OWN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    length = tl.load(t + row).to(tl.int32)
    d = tl.arange(0, WIDTH)
    asking = tl.arange(0, QUERIES)
    there = asking < SHARED
    head = (row * KV_HEADS + kv_head) * SHARED + asking
    q = tl.load(query + head[:, None] * WIDTH + d[None, :], mask=there[:, None], other=0.0)
    largest = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, length, OWN):
        k = start + tl.arange(0, OWN)
        at = ((row * KV_HEADS + kv_head) * limit + k)[:, None] * WIDTH + d[None, :]
        key = tl.load(keys + at, mask=(k < length)[:, None], other=0.0)
        scores = tl.dot(q, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where((k < length)[None, :], scores, float("-inf"))
        new = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp(scores - new[:, None])
        kept = tl.exp(largest - new)
        total = total * kept + tl.sum(weights, 1)
        value = tl.load(values + at, mask=(k < length)[:, None], other=0.0)
        out = out * kept[:, None] + tl.dot(weights.to(value.dtype), value, input_precision="ieee")
        largest = new
    asked = tl.load(place + row)
    prompt = asked // group_size
    member = asked % group_size
    for chunk in range(chunks):
        here = ((prompt * KV_HEADS + kv_head) * chunks + chunk) * group_size * SHARED + member * SHARED + asking
        far_sum = tl.load(part_sum + here, mask=there, other=float("-inf"))
        # A piece behind the prompt's end was not written.
        full = there & (far_sum > float("-inf"))
        far = tl.load(part_out + here[:, None] * WIDTH + d[None, :], mask=full[:, None], other=0.0)
        new = tl.maximum(largest, far_sum)
        kept = tl.exp(largest - new)
        share = tl.exp(far_sum - new)
        total = total * kept + share
        out = out * kept[:, None] + far * share[:, None]
        largest = new
    out = out / total[:, None]
    tl.store(attended + head[:, None] * WIDTH + d[None, :], out.to(attended.dtype.element_ty), mask=there[:, None])


def attend(query: Tensor, rows: Rows, layer: int, prompt_lengths: Tensor, scale: float) -> Tensor:
    """(R, heads, D) queries of each row's last token, whose key is kept already -> (R, heads, D).

    Args:
        prompt_lengths: (N,) tokens of each prompt.
    """
    count, heads, width = query.shape
    prompts = rows.prompts
    keys, values = prompts.keys[layer], prompts.values[layer]
    n_prompts, kv_heads, prompt_tokens, _ = keys.shape
    group_size, shared = rows.table.shape[1], heads // kv_heads
    chunk = CHUNK[query.element_size()]
    chunks = triton.cdiv(prompt_tokens, chunk)
    asking = group_size * shared
    queries = max(LEAST, min(QUERIES, triton.next_power_of_2(asking)))
    part_out = torch.empty(n_prompts, kv_heads, chunks, asking, width, dtype=torch.float32, device=query.device)
    part_sum = torch.empty(n_prompts, kv_heads, chunks, asking, dtype=torch.float32, device=query.device)
    attended = torch.empty_like(query)
    _ask_prompt[(chunks, kv_heads * triton.cdiv(asking, queries), n_prompts)](
        query, keys, values, prompt_lengths, rows.table, part_out, part_sum, scale, prompt_tokens, group_size, shared,
        chunks, heads, KV_HEADS=kv_heads, WIDTH=width, QUERIES=queries, CHUNK=chunk,
        num_warps=4 if chunk == CHUNK[2] else 8, num_stages=1,
    )  # fmt: skip
    _ask_own[(count, kv_heads)](
        query, rows.keys[layer], rows.values[layer], rows.t, rows.place, part_out, part_sum, attended, scale,
        rows.limit, group_size, chunks, KV_HEADS=kv_heads, SHARED=shared, WIDTH=width,
        QUERIES=max(LEAST, triton.next_power_of_2(shared)), OWN=OWN, num_warps=4, num_stages=2,
    )  # fmt: skip
    return attended


@triton.jit
def _gate(gate, up, out, gate_step, up_step, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < width
    g = tl.load(gate + row * gate_step + at, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_step + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (g / (1.0 + tl.exp(-g)) * u).to(out.dtype.element_ty), mask=inside)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both (R, I); rows may be apart. Source: Shazeer 2020, arXiv 2002.05202."""
    rows, width = gate.shape
    out = torch.empty(rows, width, dtype=gate.dtype, device=gate.device)
    _gate[(rows, triton.cdiv(width, GATED))](
        gate, up, out, gate.stride(0), up.stride(0), width, BLOCK=GATED, num_warps=4
    )
    return out
