"""Groups and advantages -> a step's batch -> micro-batches, with weights that do not depend on the cut."""

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from medrl.grpo import GRPO, REDUCTIONS
from medrl.policy.policy import EncodedPrompt
from medrl.sft import RFT, SFT
from medrl.training.budget import Budget
from medrl.training.scorer import Scorer
from medrl.types import Groups, Prompt

Objective = GRPO | SFT | RFT


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingGroup:
    """A prompt and what is to be learned from its completions."""

    prompt: Prompt
    completions: tuple[tuple[int, ...], ...]
    """G token id sequences."""
    advantages: tuple[float, ...]
    """(G,) one per completion; all 1 where completions are targets to imitate."""
    sampling_logprobs: tuple[tuple[float, ...], ...]
    """G sequences, as the sampler saw them; empty where nothing was sampled."""
    sampled_elsewhere: bool = False
    """Whether another program drew them: its log-probabilities are then not quite the policy's, which is corrected."""


Batch = tuple[TrainingGroup, ...]


def pack_groups(groups: Groups, advantages: Tensor, *, sampled_elsewhere: bool = False) -> Batch:
    """Groups and their (N, G) advantages -> what an update trains on."""
    return tuple(
        TrainingGroup(
            prompt=group.prompt,
            completions=tuple(rollout.completion.token_ids for rollout in group.rollouts),
            advantages=tuple(values),
            sampling_logprobs=tuple(rollout.completion.sampling_logprobs for rollout in group.rollouts),
            sampled_elsewhere=sampled_elsewhere,
        )
        for group, values in zip(groups, advantages.tolist(), strict=True)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class MicroBatch:
    """Some groups of a step that go through the model together."""

    groups: Batch
    encoded: tuple[EncodedPrompt, ...]
    weights: Tensor
    """(R, 1) share of each completion's tokens in the step's loss."""
    entropy_weight: float
    """Share of a token in the step's mean entropy: 1 / (tokens of the step)."""

    @property
    def advantages(self) -> Tensor:
        """(R, 1)."""
        return torch.tensor([a for group in self.groups for a in group.advantages], dtype=torch.float64)[:, None]

    @property
    def sampling_logprobs(self) -> Tensor | None:
        """(R, T) float64 nats, where another program drew the completions; 0 at padding."""
        if not all(group.sampled_elsewhere for group in self.groups):
            return None
        rows = [torch.tensor(row, dtype=torch.float64) for group in self.groups for row in group.sampling_logprobs]
        return pad_sequence(rows, batch_first=True)

    @property
    def completions(self) -> list[tuple[tuple[int, ...], ...]]:
        return [group.completions for group in self.groups]

    @property
    def ids(self) -> list[str]:
        """(R,) example of each completion."""
        return [group.prompt.id for group in self.groups for _ in group.completions]

    @property
    def tokens(self) -> int:
        prompts = sum(len(prompt.token_ids) for prompt in self.encoded)
        return prompts + sum(len(ids) - 1 for group in self.completions for ids in group)

    @property
    def patches(self) -> int:
        return sum(len(prompt.pixels) for prompt in self.encoded if prompt.pixels is not None)


def cut(
    policy: Scorer,
    batch: Batch,
    objective: Objective,
    budget: Budget,
    max_tokens: int | None = None,
    mine: Collection[int] | None = None,
) -> list[MicroBatch]:
    """Cut a step into micro-batches of whole groups; a group larger than the budget gets one of its own.

    Where neither KL nor entropy is in the loss, groups without advantages have no gradient and are left out; the
    weights count them. ``max_tokens`` is the longest allowed completion, which ``reduction: constant`` divides by.
    ``mine`` are the places in the batch of the groups that this process learns from, None for all; the weights are the
    step's.
    """
    lengths = torch.tensor([len(ids) for group in batch for ids in group.completions], dtype=torch.long)
    sizes = [len(group.completions) for group in batch]
    weights = REDUCTIONS[objective.reduction](lengths, max_tokens).split(sizes) if batch else ()
    entropy_weight = 1 / max(1, int(lengths.sum()))
    kept = [(batch[i], weights[i]) for i in learned_from(batch, objective) if mine is None or i in mine]
    encoded = policy.encode([group.prompt for group, _ in kept])
    groups = [
        MicroBatch(groups=(group,), encoded=(prompt,), weights=weight, entropy_weight=entropy_weight)
        for (group, weight), prompt in zip(kept, encoded, strict=True)
    ]
    most = budget.of_step(sum(budget.cost(group.tokens, group.patches) for group in groups))
    micro_batches: list[MicroBatch] = []
    for alone in groups:
        last = micro_batches[-1] if micro_batches else None
        if last is not None and sum(budget.cost(part.tokens, part.patches) for part in (last, alone)) <= most:
            micro_batches[-1] = replace(
                last,
                groups=last.groups + alone.groups,
                encoded=last.encoded + alone.encoded,
                weights=torch.cat([last.weights, alone.weights]),
            )
        else:
            micro_batches.append(alone)
    return micro_batches


def learned_from(batch: Batch, objective: Objective) -> list[int]:
    """Places in the batch of the groups that have a gradient."""
    idle = advantages_are_all(objective)
    return [i for i, group in enumerate(batch) if not idle or any(group.advantages)]


def advantages_are_all(objective: Objective) -> bool:
    """Whether a completion without an advantage has no part in the loss."""
    if not isinstance(objective, GRPO):
        return False
    kl_in_loss = objective.kl_coef > 0 and not objective.row.kl_in_reward
    return not kl_in_loss and objective.entropy_coef == 0
