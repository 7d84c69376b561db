"""Packed streams: ``[prompt | c1 | ... | cG]`` for several groups, one after another, each token computed once.

A completion's last token is scored but predicts nothing, so it is not in the stream; the prompt's last token predicts
the first token of every completion of its group. Every completion continues the prompt's positions as if it were alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medrl.policy.transfer import bring


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where everything is in a stream of T tokens that holds N groups, R completions and M completion tokens."""

    group: Tensor
    """(T,) which group a token belongs to; tokens of a group are contiguous."""
    branch: Tensor
    """(T,) 0 for the prompt, 1..G for the completions of the group."""
    positions: Tensor
    """(3, T) rotary positions: time, height, width."""
    prompt_index: Tensor
    """(sum of prompt lengths,) where the prompts' tokens are, in order."""
    completion_index: Tensor
    """(M - R,) where the completions' tokens are, in order, without each one's last."""
    predictor: Tensor
    """(M,) where the hidden state is that predicts each completion token."""
    row: Tensor
    """(M,) which completion a token belongs to, 0..R-1."""
    column: Tensor
    """(M,) its place within the completion."""
    group_lengths: tuple[int, ...]
    """(N,) tokens of each group in the stream."""
    prompt_lengths: tuple[int, ...]
    """(N,) tokens of each prompt, the first of its group."""
    group_sizes: tuple[int, ...]
    """(N,) completions of each group."""
    completion_lengths: tuple[int, ...]
    """(R,) tokens of each completion."""

    @property
    def shape(self) -> tuple[tuple[int, ...], ...]:
        """What two layouts must share for the same tokens to see each other."""
        return self.prompt_lengths, self.group_sizes, self.completion_lengths

    @property
    def completion_mask(self) -> Tensor:
        """(R, longest completion) 1.0 where a token counts."""
        return self.spread(torch.ones(len(self.row), device=self.row.device))

    def spread(self, values: Tensor) -> Tensor:
        """(M,) one value per completion token -> (R, longest completion), 0 where there is none."""
        out = values.new_zeros(len(self.completion_lengths), max(self.completion_lengths))
        return out.index_put((self.row, self.column), values)

    def to(self, device: torch.device | str) -> "Layout":
        fields: dict[str, Any] = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields.update({name: bring(v, device) for name, v in fields.items() if isinstance(v, Tensor)})
        return Layout(**fields)


def pack(prompt_positions: Sequence[Tensor], completion_lengths: Sequence[Sequence[int]]) -> Layout:
    """Lay out groups of completions behind their prompts.

    Args:
        prompt_positions: N tensors (3, P_i), rotary positions of each prompt.
        completion_lengths: for each of the N prompts, the lengths (at least 1) of its completions.
    """
    assert len(prompt_positions) == len(completion_lengths)
    group, branch, positions = [], [], []
    prompt_index, completion_index, predictor, row, column = [], [], [], [], []
    start, rows = 0, 0
    for n, (prompt, lengths) in enumerate(zip(prompt_positions, completion_lengths, strict=True)):
        p = prompt.shape[1]
        next_position = int(prompt.max()) + 1
        prompt_index.append(torch.arange(start, start + p))
        branch.append(torch.zeros(p, dtype=torch.long))
        positions.append(prompt)
        at = start + p
        for g, length in enumerate(lengths):
            assert length >= 1, "a completion has at least its end-of-turn token"
            inside = length - 1
            completion_index.append(torch.arange(at, at + inside))
            branch.append(torch.full((inside,), g + 1))
            positions.append((next_position + torch.arange(inside)).expand(3, -1))
            predictor.append(torch.cat([torch.tensor([start + p - 1]), torch.arange(at, at + inside)]))
            row.append(torch.full((length,), rows))
            column.append(torch.arange(length))
            at, rows = at + inside, rows + 1
        group.append(torch.full((at - start,), n))
        start = at
    return Layout(
        group=torch.cat(group),
        branch=torch.cat(branch),
        positions=torch.cat(positions, dim=1),
        prompt_index=torch.cat(prompt_index),
        completion_index=torch.cat(completion_index),
        predictor=torch.cat(predictor),
        row=torch.cat(row),
        column=torch.cat(column),
        group_lengths=tuple(len(part) for part in group),
        prompt_lengths=tuple(prompt.shape[1] for prompt in prompt_positions),
        group_sizes=tuple(len(lengths) for lengths in completion_lengths),
        completion_lengths=tuple(length for lengths in completion_lengths for length in lengths),
    )


def visible(layout: Layout) -> Tensor:
    """(T, T) True where query (row) may attend to key (column): earlier in its group, in its prompt or branch."""
    order = torch.arange(len(layout.group), device=layout.group.device)
    same_group = layout.group[:, None] == layout.group[None]
    earlier = order[:, None] >= order[None]
    shared = (layout.branch[None] == 0) | (layout.branch[None] == layout.branch[:, None])
    return same_group & earlier & shared
