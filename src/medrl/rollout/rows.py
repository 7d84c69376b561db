"""The completions that are being written: one row each, behind prompts that are computed and kept once per group.

Every row is at a token of its own, so a row that has ended makes room for one that begins (`regroup`). Prompts of
different lengths are padded against each other once per prompt, not once per completion, and the padding is masked.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Keys and values of N prompts of up to P tokens, for L layers."""

    keys: Tensor
    """(L, N, kv_heads, P, D)."""
    values: Tensor
    padding: Tensor
    """(N, 1, 1, P) True where there is no token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """R completions of N prompts, up to C tokens each."""

    prompts: Prompts
    table: Tensor
    """(N, G) rows that ask each prompt; where there are fewer than G, some row again."""
    place: Tensor
    """(R,) where a row stands in the flattened table."""
    keys: Tensor
    """(L, R, kv_heads, C, D) of the completions' own tokens."""
    values: Tensor
    first: Tensor
    """(R,) rotary position of a completion's first token, the same on all axes."""
    uniform: Tensor
    """(R, C + 1) the randomness of each draw. Here and below, the last column is for rows that are full."""
    tokens: Tensor
    """(R,) the token drawn last."""
    written: Tensor
    """(R, C + 1) tokens so far."""
    logprobs: Tensor
    """(R, C + 1) of those tokens."""
    t: Tensor
    """(R,) how many tokens that are; a row that has ended stays where it is."""
    ended: Tensor
    """(R,) whether the last of them ended the completion, or there is room for no more."""

    @property
    def limit(self) -> int:
        """C."""
        return self.keys.shape[3]

    def copy_(self, other: "Rows") -> None:
        """Take the state of ``other``, which has the same shape, in place."""
        for mine, theirs in ((self, other), (self.prompts, other.prompts)):
            for field in fields(mine):
                if field.name != "prompts":
                    getattr(mine, field.name).copy_(getattr(theirs, field.name))

    def buffers(self, count: int) -> "Rows":
        """Memory for ``count`` rows like these, and for such prompts; what is in it means nothing."""
        prompts = {field.name: torch.empty_like(getattr(self.prompts, field.name)) for field in fields(self.prompts)}
        rows = {name: getattr(self, name) for name in AXIS}
        rows = {
            name: x.new_empty((*x.shape[: AXIS[name]], count, *x.shape[AXIS[name] + 1 :])) for name, x in rows.items()
        }
        return replace(self, prompts=Prompts(**prompts), table=torch.empty_like(self.table), **rows)

    def narrow(self, count: int) -> "Rows":
        """The first ``count`` rows, in the same memory."""
        return replace(self, **{name: getattr(self, name).narrow(axis, 0, count) for name, axis in AXIS.items()})


AXIS = {"keys": 1, "values": 1} | dict.fromkeys(
    ("place", "first", "uniform", "tokens", "written", "logprobs", "t", "ended"), 0
)
"""What every row has of its own -> which of its axes counts rows."""


def begin(prompts: Prompts, first: Sequence[int], uniform: Tensor) -> Rows:
    """Rows before their first token, the same number behind each of N prompts.

    Args:
        first: (N,) rotary position of a prompt's first completion token.
        uniform: (N * G, C) the randomness of each draw, group by group.
    """
    device, (total, limit) = uniform.device, uniform.shape
    layers, _, kv_heads, _, width = prompts.keys.shape
    group_size = total // len(first)
    keys = prompts.keys.new_zeros(layers, total, kv_heads, limit, width)
    return Rows(
        prompts=prompts,
        table=torch.arange(total, device=device).view(len(first), group_size),
        place=torch.arange(total, device=device),
        keys=keys,
        values=torch.zeros_like(keys),
        first=torch.tensor(first, device=device).repeat_interleave(group_size),
        uniform=F.pad(uniform, (0, 1)),
        tokens=torch.zeros(total, dtype=torch.long, device=device),
        written=torch.zeros(total, limit + 1, dtype=torch.long, device=device),
        logprobs=torch.zeros(total, limit + 1, device=device),
        t=torch.zeros(total, dtype=torch.long, device=device),
        ended=torch.zeros(total, dtype=torch.bool, device=device),
    )


@dataclass(frozen=True, slots=True)
class Part:
    """Some rows of a batch, and the prompts they ask."""

    rows: Rows
    kept: list[int]
    """Which rows."""
    prompts: list[int]
    """Which prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What there is to be place for; the buffers of a captured step do not change their sizes."""

    rows: int
    prompts: int
    prompt_tokens: int
    group_size: int


def regroup(parts: Sequence[Part], group: Sequence[int], shape: Shape) -> Rows:
    """The kept rows of all parts as one batch, in order; what is left of ``shape`` is filled up with rows that ended.

    Args:
        parts: none without a row.
        group: (R,) for each row, which of the prompts of all parts, in order, it asks.
    """
    device, count = parts[0].rows.t.device, len(group)
    rows = [torch.tensor(part.kept, device=device) for part in parts]
    rows[-1] = _filled(rows[-1], shape.rows - count)
    slots = [torch.tensor(part.prompts, device=device) for part in parts]
    slots[-1] = _filled(slots[-1], shape.prompts - sum(map(len, slots)))

    def gather(name: str, dim: int) -> Tensor:
        return torch.cat(
            [getattr(part.rows, name).index_select(dim, at) for part, at in zip(parts, rows, strict=True)], dim
        )

    def gather_prompts(name: str, dim: int, missing: float) -> Tensor:
        chosen = [getattr(part.rows.prompts, name).index_select(dim, at) for part, at in zip(parts, slots, strict=True)]
        axis = -2 if name != "padding" else -1
        return torch.cat([_fit(x, axis, shape.prompt_tokens, missing) for x in chosen], dim)

    table, place = tabulate(group, shape)
    return Rows(
        prompts=Prompts(
            keys=gather_prompts("keys", 1, 0.0),
            values=gather_prompts("values", 1, 0.0),
            padding=gather_prompts("padding", 0, True),
        ),
        table=torch.tensor(table, device=device),
        place=torch.tensor([*place, *place[-1:] * (shape.rows - count)], device=device),
        keys=gather("keys", 1),
        values=gather("values", 1),
        ended=torch.arange(shape.rows, device=device) >= count,
        **{name: gather(name, 0) for name in ("first", "uniform", "tokens", "written", "logprobs", "t")},
    )


def tabulate(group: Sequence[int], shape: Shape) -> tuple[list[list[int]], list[int]]:
    """(N, G) rows that ask each prompt, padded with row 0; and (R,) each row's place in it, flattened."""
    table: list[list[int]] = [[] for _ in range(shape.prompts)]
    place = []
    for row, number in enumerate(group):
        place.append(number * shape.group_size + len(table[number]))
        table[number].append(row)
    return [rows + [0] * (shape.group_size - len(rows)) for rows in table], place


def _filled(index: Tensor, missing: int) -> Tensor:
    return torch.cat([index, index[-1:].expand(missing)])


def _fit(x: Tensor, axis: int, length: int, missing: float) -> Tensor:
    """Cut off, or padded with ``missing``, at the end of the axis, which is the last or the one before."""
    more = length - x.shape[axis]
    return x if more == 0 else F.pad(x, (0, more) if axis == -1 else (0, 0, 0, more), value=missing)
