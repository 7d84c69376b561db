"""One optimizer step over packed groups -> Update.

The step's loss is one sum over all its completion tokens, with weights fixed before it is cut into micro-batches, so
the gradient does not depend on the cut.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medrl import stopping
from medrl.errors import NonFiniteError
from medrl.grpo import GRPO
from medrl.policy.policy import Policy, ScoredCompletions
from medrl.training.batches import Batch, MicroBatch, Objective, cut
from medrl.training.objectives import TERMS, Terms
from medrl.training.optim import AdamW


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one optimizer step did."""

    loss: float
    policy_loss: float
    kl: float
    """Mean KL to the reference, nats per token."""
    clip_fraction: float
    entropy: float
    """Mean entropy of the completion tokens' distributions, nats."""
    grad_norm: float
    """Before clipping."""
    lr: float
    sampling_gap: float | None
    """Mean absolute difference between the sampler's log-probabilities and the training pass's; None if not sampled."""
    skipped_groups: int
    """Groups without a gradient, which cost no pass."""
    tokens: int
    """Tokens that went through the training pass."""


def update_policy(
    policy: Policy,
    batch: Batch,
    optimizer: AdamW,
    objective: Objective,
    *,
    lr: float,
    temperature: float = 1.0,
    tokens_per_micro_batch: int = 4096,
) -> Update:
    """Move the policy one step (``updates_per_rollout`` steps on the same completions) along the objective.

    Raises ``NonFiniteError`` naming the examples when loss or gradient is NaN or infinite; that update has changed no
    weight then (with several updates per rollout, earlier ones have). Raises ``Stopped`` between micro-batches before
    any weight has moved.
    """
    micro_batches = cut(policy, batch, objective, tokens_per_micro_batch)
    rounds = objective.updates_per_rollout if isinstance(objective, GRPO) else 1
    old: list[Tensor | None] = [None] * len(micro_batches)
    totals = _Totals()
    optimizer.zero_grad()  # what an update that was stopped half-way has left behind
    for round in range(rounds):
        totals = _Totals()
        for index, micro_batch in enumerate(micro_batches):
            if round == 0:  # later the weights have moved, and the step must be finished
                stopping.check()
            terms, scored = _backward(policy, micro_batch, objective, temperature, old[index])
            optimizer.accumulate()
            totals.add(terms, scored, micro_batch)
            if rounds > 1 and old[index] is None:
                old[index] = scored.logprobs.detach()
        try:
            grad_norm = optimizer.step(lr)
        except NonFiniteError as error:
            optimizer.zero_grad()
            culprits = _non_finite_gradients(policy, micro_batches, objective, temperature, old, optimizer)
            raise NonFiniteError(f"{error}; it comes from example {' or '.join(culprits)}") from error
    return totals.update(grad_norm, lr, skipped=len(batch) - sum(len(m.groups) for m in micro_batches))


def _backward(
    policy: Policy, micro_batch: MicroBatch, objective: Objective, temperature: float, old: Tensor | None
) -> tuple[Terms, ScoredCompletions]:
    scored = policy.logprobs(micro_batch.encoded, micro_batch.completions, temperature=temperature)
    terms = TERMS[type(objective)](policy, micro_batch, scored, objective, temperature, old)
    if not math.isfinite(float(terms.loss.detach())):
        raise NonFiniteError(_describe_loss(micro_batch, scored, float(terms.loss.detach())))
    terms.loss.backward()
    return terms, scored


class _Totals:
    """Sums of the micro-batches' shares."""

    def __init__(self) -> None:
        self.loss = self.policy = self.kl = self.clip_fraction = 0.0
        self.entropy = self.gap = 0.0
        self.scored_tokens = self.sampled_tokens = self.tokens = 0

    def add(self, terms: Terms, scored: ScoredCompletions, micro_batch: MicroBatch) -> None:
        self.loss += float(terms.loss.detach())
        self.policy += terms.policy
        self.kl += terms.kl
        self.clip_fraction += terms.clip_fraction
        self.entropy += float((scored.entropy * scored.completion_mask).sum())
        self.scored_tokens += int(scored.completion_mask.sum())
        self.tokens += micro_batch.tokens
        sampled = [values for group in micro_batch.groups for values in group.sampling_logprobs]
        for row, values in enumerate(sampled):
            trained = scored.logprobs[row, : len(values)].detach().cpu()
            self.gap += float((trained - torch.tensor(values, dtype=trained.dtype)).abs().sum())
            self.sampled_tokens += len(values)

    def update(self, grad_norm: float, lr: float, skipped: int) -> Update:
        return Update(
            loss=self.loss,
            policy_loss=self.policy,
            kl=self.kl,
            clip_fraction=self.clip_fraction,
            entropy=self.entropy / max(1, self.scored_tokens),
            grad_norm=grad_norm,
            lr=lr,
            sampling_gap=self.gap / self.sampled_tokens if self.sampled_tokens else None,
            skipped_groups=skipped,
            tokens=self.tokens,
        )


def _describe_loss(micro_batch: MicroBatch, scored: ScoredCompletions, loss: float) -> str:
    finite = (scored.logprobs.isfinite() | (scored.completion_mask == 0)).all(dim=1).tolist()
    broken = sorted({id for id, fine in zip(micro_batch.ids, finite, strict=True) if not fine})
    if not broken:
        return (
            f"the loss is {loss}; the log-probabilities are finite, so it comes from an advantage or the reference, of "
            f"example {' or '.join(sorted(set(micro_batch.ids)))}. No weight was changed: look at that example's reward"
        )
    return (
        f"the loss is {loss}; its log-probabilities are not finite for example {' or '.join(broken)}. "
        "No weight was changed: look at that example's images, or lower optim.lr"
    )


def _non_finite_gradients(
    policy: Policy,
    micro_batches: Sequence[MicroBatch],
    objective: Objective,
    temperature: float,
    old: Sequence[Tensor | None],
    optimizer: AdamW,
) -> list[str]:
    """Examples of the micro-batches whose own gradient is not finite; all of them when only their sum is not."""
    culprits: list[str] = []
    for micro_batch, old_logprobs in zip(micro_batches, old, strict=True):
        _backward(policy, micro_batch, objective, temperature, old_logprobs)
        gradients = [p.grad for p in policy.model.parameters() if p.grad is not None]
        if not all(bool(gradient.isfinite().all()) for gradient in gradients):
            culprits += sorted(set(micro_batch.ids))
        optimizer.zero_grad()
    return culprits or sorted({id for micro_batch in micro_batches for id in micro_batch.ids})
