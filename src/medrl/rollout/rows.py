"""The completions that are being written: one row each, behind prompts that are computed and kept once per group.

Attention of a new token has two parts: its prompt, whose keys all rows of the group ask together, and its own
completion. They are merged by their log-sum-exps, as in training (policy/varlen.py). So the keys of a prompt exist
once, not once per completion; prompts of different lengths are padded once per prompt, and the padding is masked.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from medrl.policy.logprobs import HALF, head_logits
from medrl.policy.policy import Policy
from medrl.rollout.sampling import Sampling, draw_tokens


class Recorder:
    """What a prefill leaves behind, as transformers' cache protocol hands it in: every layer's keys and values."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        assert layer_idx == len(self.keys)
        self.keys.append(key[0])
        self.values.append(value[0])
        return key, value

    def get_seq_length(self, *_: object) -> int:
        return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Keys and values of N prompts of up to P tokens, for L layers."""

    keys: Tensor
    """(L, N, kv_heads, P, D)."""
    values: Tensor
    mask: Tensor
    """(N, 1, 1, P) True where there is a token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """R completions of N prompts, up to C tokens each. All are at the same token."""

    prompts: Prompts
    table: Tensor
    """(N, G) rows that ask each prompt; where there are fewer than G, some row again."""
    place: Tensor
    """(R,) where a row stands in the flattened table."""
    keys: Tensor
    """(L, R, kv_heads, C, D) of the completions' own tokens."""
    values: Tensor
    here: Tensor
    """(R,) which completion of the batch a row is."""
    tokens: Tensor
    """(R,) the token drawn last."""
    positions: Tensor
    """(3, R, 1) its rotary position."""
    uniform: Tensor
    """(R, C) the randomness of each draw."""
    written: Tensor
    """(R, C) tokens so far."""
    logprobs: Tensor
    """(R, C) of those tokens."""
    lengths: Tensor
    """(R,) tokens up to and including the one that ended the completion; C where none did."""
    t: Tensor
    """(1,) tokens drawn so far."""

    @property
    def ended(self) -> Tensor:
        """(R,)."""
        return self.lengths <= self.t

    def pick(self, rows: Tensor) -> "Rows":
        """Only these rows, in this order; a row may be named twice."""
        by_row = ("here", "tokens", "uniform", "written", "logprobs", "lengths")
        group = self.place[rows] // self.table.shape[1]
        table, place = tabulate(group.tolist(), self.here[rows].tolist(), self.table.shape, self.table.device)
        return replace(
            self,
            table=table,
            place=place,
            keys=self.keys[:, rows],
            values=self.values[:, rows],
            positions=self.positions[:, rows],
            **{name: getattr(self, name)[rows] for name in by_row},
        )

    def copy_(self, other: "Rows") -> None:
        """Take the state of ``other``, which has the same shape, in place; the prompts are not looked at."""
        for field in fields(self):
            if field.name != "prompts":
                getattr(self, field.name).copy_(getattr(other, field.name))

    def clone(self) -> "Rows":
        return replace(
            self, **{field.name: getattr(self, field.name).clone() for field in fields(self) if field.name != "prompts"}
        )


def tabulate(group: list[int], here: list[int], shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor]:
    """Which rows ask each prompt, and where each row stands among them.

    Args:
        group: (R,) prompt of each row.
        here: (R,) completion of each row; a row that is there twice asks once.
        shape: N prompts, G completions of each at most.

    Returns:
        (N, G) rows, padded with row 0, and (R,) places in it, flattened.
    """
    n_groups, width = shape
    rows: list[list[int]] = [[] for _ in range(n_groups)]
    places: dict[int, int] = {}
    for row, (number, completion) in enumerate(zip(group, here, strict=True)):
        if completion not in places:
            places[completion] = number * width + len(rows[number])
            rows[number].append(row)
    table = [of_group + [0] * (width - len(of_group)) for of_group in rows]
    return torch.tensor(table, device=device), torch.tensor([places[c] for c in here], device=device)


class Decoder:
    """Draws one more token for every row."""

    def __init__(self, policy: Policy, sampling: Sampling, rows: Rows, *, static: bool = False) -> None:
        """``static``: no shape and no number of Python's depends on the token, so that a step can be captured."""
        self.policy, self.sampling, self.rows, self.static = policy, sampling, rows, static
        self.stops = torch.tensor(policy.stop_token_ids, dtype=torch.long, device=policy.device)
        self.slots = torch.arange(rows.keys.shape[3], device=policy.device)
        self.layer = 0

    def step(self) -> None:
        family = self.policy.family
        self.layer = 0
        hidden = family.hidden(family.embed(self.rows.tokens[:, None]), self.rows.positions, self)  # (R, 1, H)
        self.draw(head_logits(hidden[:, -1], family.head))

    def draw(self, logits: Tensor) -> None:
        """Draw token t of every row from its (R, V) logits and write it down."""
        rows, t = self.rows, self.rows.t
        tokens, logprobs = draw_tokens(logits, rows.uniform.index_select(1, t).squeeze(1), self.sampling)
        rows.written.index_copy_(1, t, tokens[:, None])
        rows.logprobs.index_copy_(1, t, logprobs[:, None].to(rows.logprobs.dtype))
        ends = (tokens[:, None] == self.stops).any(1) & (rows.lengths > t)
        rows.lengths.copy_(torch.where(ends, t + 1, rows.lengths))
        rows.tokens.copy_(tokens)
        rows.positions.add_(1)
        rows.t.add_(1)

    # medrl's visibility; no cache of transformers', whose layers are compiled without one
    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(R, heads, 1, D) against the prompt and the row's own tokens, to which (R, kv_heads, 1, D) are added."""
        prompts, table = self.rows.prompts, self.rows.table
        key, value, written = self._own(key, value)
        rows, heads, _, width = query.shape
        kv_heads = key.shape[1]
        q = (query * scale).reshape(
            rows, kv_heads, heads // kv_heads, width
        )  # heads that share keys: rows of one query
        near, near_sum = _attend(q, key, value, written)
        asked = q[table].transpose(1, 2).flatten(2, 3)  # (N, kv_heads, G * shared heads, D)
        far, far_sum = _attend(asked, prompts.keys[self.layer], prompts.values[self.layer], prompts.mask)
        far, far_sum = (self._by_row(x, kv_heads, heads // kv_heads) for x in (far, far_sum))
        share = (near_sum - far_sum).sigmoid()  # exp(near) / (exp(near) + exp(far))
        out = share * near + (1 - share) * far
        self.layer += 1
        return out.to(query.dtype).reshape(rows, heads, 1, width)

    def _own(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the rows' own tokens with those of the last one, and which count, where not all do."""
        keys, values = self.rows.keys[self.layer], self.rows.values[self.layer]
        slot = self.rows.t - 1
        keys.index_copy_(2, slot, key)
        values.index_copy_(2, slot, value)
        if self.static:
            return keys, values, self.slots < self.rows.t
        end = int(self.rows.t)
        return keys[:, :, :end], values[:, :, :end], None

    def _by_row(self, x: Tensor, kv_heads: int, shared: int) -> Tensor:
        """(N, kv_heads, G * shared, D) -> (R, kv_heads, shared, D)."""
        n_groups, size = self.rows.table.shape
        grouped = x.view(n_groups, kv_heads, size, shared, -1).transpose(1, 2).flatten(0, 1)
        return grouped[self.rows.place]


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, heads, T, D) scaled queries -> output, and log-sum-exp (B, heads, T, 1); sums in float32 at least."""
    scores = _product(query, key.transpose(-1, -2))
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf)
    sums = scores.logsumexp(-1, keepdim=True)
    return _product((scores - sums).exp().to(value.dtype), value), sums


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product whose result keeps float32 where the factors are half."""
    if a.is_cuda and a.dtype in HALF:
        out: Any = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return out.unflatten(0, a.shape[:2])
    return a @ b if a.dtype not in HALF else a.float() @ b.float()
