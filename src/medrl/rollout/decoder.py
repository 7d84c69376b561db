"""One step of decoding: one more token for every row.

Attention of a new token has two parts: its prompt, whose keys all rows of the group ask together, and its own
completion. They are merged by their log-sum-exps, as in training (policy/varlen.py).
"""

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from medrl.policy.logprobs import HALF, head_logits
from medrl.policy.policy import Policy
from medrl.rollout.rows import Rows
from medrl.rollout.sampling import Sampling, draw_tokens


class RowAttention:
    """Attention of every row's last token, as medrl's visibility: its prompt and its own tokens.

    No cache of transformers', whose layers are compiled without one.
    """

    def __init__(self, rows: Rows, *, static: bool = False) -> None:
        """``static``: no shape and no number of Python's depends on the tokens, so that a step can be captured."""
        self.rows, self.static = rows, static
        device = rows.t.device
        self.slots = torch.arange(rows.limit, device=device)
        of_heads = rows.keys.shape[1:3]  # R, kv_heads
        self.starts = rows.limit * torch.arange(of_heads.numel(), device=device).view(of_heads)

    def begin(self) -> "RowAttention":
        """Before the first layer of a step."""
        rows = self.rows
        slot = rows.t - 1  # of the token drawn last, whose keys are still to be written
        self.layer, self.length = 0, rows.limit
        self.at = (self.starts + slot[:, None]).flatten()
        self.unwritten: Tensor | None = (self.slots > slot[:, None])[:, None, None]  # (R, 1, 1, C)
        if not self.static:
            # Only what the longest row has written; nothing is masked where all have written as much.
            shortest, self.length = (int(end) for end in rows.t.aminmax())
            self.unwritten = None if shortest == self.length else self.unwritten[..., : self.length]
        return self

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """(R, heads, 1, D) against the prompt and the row's own tokens, to which (R, kv_heads, 1, D) are added."""
        prompts, table = self.rows.prompts, self.rows.table
        rows, heads, _, width = query.shape
        kv_heads = key.shape[1]
        shared = heads // kv_heads
        q = (query * scale).reshape(rows, kv_heads, shared, width)  # heads that share keys: rows of one query
        own_keys, own_values = self._write(self.rows.keys, key), self._write(self.rows.values, value)
        near, near_sum = _attend(q, own_keys, own_values, self.unwritten)
        asked = q[table].transpose(1, 2).flatten(2, 3)  # (N, kv_heads, G * shared, D)
        far, far_sum = _attend(asked, prompts.keys[self.layer], prompts.values[self.layer], prompts.padding)
        far, far_sum = (self._by_row(x, kv_heads, shared) for x in (far, far_sum))
        share = (near_sum - far_sum).sigmoid()  # exp(near) / (exp(near) + exp(far))
        out = share * near + (1 - share) * far
        self.layer += 1
        return out.to(query.dtype).reshape(rows, heads, 1, width)

    def _write(self, kept: Tensor, new: Tensor) -> Tensor:
        """Put (R, kv_heads, 1, D) into this layer's slots: (R, kv_heads, tokens, D) so far."""
        layer = kept[self.layer]
        layer.view(-1, layer.shape[-1]).index_copy_(0, self.at, new.reshape(-1, new.shape[-1]))
        return layer[:, :, : self.length]

    def _by_row(self, x: Tensor, kv_heads: int, shared: int) -> Tensor:
        """(N, kv_heads, G * shared, D) -> (R, kv_heads, shared, D)."""
        n_groups, size = self.rows.table.shape
        grouped = x.view(n_groups, kv_heads, size, shared, -1).transpose(1, 2).flatten(0, 1)
        return grouped[self.rows.place]


class Stepper(ABC):
    """Draws one more token for every row, whatever computes their hidden states."""

    def __init__(self, policy: Policy, sampling: Sampling, rows: Rows) -> None:
        self.policy, self.sampling, self.rows = policy, sampling, rows
        self.stops = torch.tensor(policy.stop_token_ids, device=policy.device)

    @abstractmethod
    def hidden(self) -> Tensor:
        """(R, H) last hidden state of every row's last token."""

    def step(self) -> None:
        self.draw(head_logits(self.hidden(), self.policy.family.head))

    def draw(self, logits: Tensor) -> None:
        """Draw the next token of every row from its (R, V) logits and write it down; a row that ended keeps its end."""
        rows, t = self.rows, self.rows.t[:, None]
        tokens, logprobs = draw_tokens(logits, rows.uniform.gather(1, t).squeeze(1), self.sampling)
        rows.written.scatter_(1, t, tokens[:, None])
        rows.logprobs.scatter_(1, t, logprobs[:, None].to(rows.logprobs.dtype))
        rows.tokens.copy_(tokens)
        rows.t.add_(~rows.ended)
        rows.ended.logical_or_((tokens[:, None] == self.stops).any(1) | (rows.t == rows.limit))


class Decoder(Stepper):
    """Steps through the model's own layers."""

    def __init__(self, policy: Policy, sampling: Sampling, rows: Rows, *, static: bool = False) -> None:
        """``static``: a step can be captured."""
        super().__init__(policy, sampling, rows)
        self.attention = RowAttention(rows, static=static)

    def hidden(self) -> Tensor:
        rows, family = self.rows, self.policy.family
        positions = (rows.first + rows.t - 1).expand(3, -1)[..., None]
        return family.hidden(family.embed(rows.tokens[:, None]), positions, self.attention.begin())[:, -1]


def _attend(query: Tensor, key: Tensor, value: Tensor, padding: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, heads, T, D) scaled queries -> output, and log-sum-exp (B, heads, T, 1); sums in float32 at least."""
    scores = _product(query, key.transpose(-1, -2))
    if padding is not None:
        scores = scores.masked_fill(padding, -torch.inf)
    sums = scores.logsumexp(-1, keepdim=True)
    return _product((scores - sums).exp().to(value.dtype), value), sums


def _product(a: Tensor, b: Tensor) -> Tensor:
    """Batched matrix product whose result keeps float32 where the factors are half."""
    if a.is_cuda and a.dtype in HALF:
        out: Any = torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out_dtype=torch.float32)
        return out.unflatten(0, a.shape[:2])
    return a @ b if a.dtype not in HALF else a.float() @ b.float()
