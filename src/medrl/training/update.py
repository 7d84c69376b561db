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
from medrl.policy.policy import ScoredCompletions
from medrl.training.batches import Batch, MicroBatch, Objective, Scorer, cut
from medrl.training.objectives import TERMS, Terms
from medrl.training.optim import AdamW


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the training pass says of one completion: means over its tokens, in nats."""

    entropy: float
    kl: float | None
    """None without a reference in the loss."""
    sampling_gap: float | None
    """Mean absolute difference between the sampler's log-probabilities and the training pass's; None if not sampled."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update:
    """What one optimizer step did."""

    loss: float
    policy_loss: float
    kl: float
    """Mean KL to the reference over all tokens of the step, nats."""
    clip_fraction: float
    """Share of all tokens of the step whose ratio was clipped."""
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
    completions: tuple[tuple[Measured, ...] | None, ...] = ()
    """Per group of the batch, in order, each of its completions; None for a group that was skipped."""


def update_policy(
    policy: Scorer,
    batch: Batch,
    optimizer: AdamW,
    objective: Objective,
    *,
    lr: float,
    temperature: float = 1.0,
    tokens_per_micro_batch: int = 4096,
    max_tokens: int | None = None,
) -> Update:
    """Move the policy one step (``updates_per_rollout`` steps on the same completions) along the objective.

    ``max_tokens`` is the longest allowed completion; only ``reduction: constant`` needs it.

    Raises ``NonFiniteError`` naming the examples when loss or gradient is NaN or infinite; that update has changed no
    weight then (with several updates per rollout, earlier ones have). Raises ``Stopped`` between micro-batches before
    any weight has moved.
    """
    micro_batches = cut(policy, batch, objective, tokens_per_micro_batch, max_tokens)
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
    return totals.update(grad_norm, lr, batch)


def _backward(
    policy: Scorer, micro_batch: MicroBatch, objective: Objective, temperature: float, old: Tensor | None
) -> tuple[Terms, ScoredCompletions]:
    scored = policy.logprobs(micro_batch.encoded, micro_batch.completions, temperature=temperature)
    terms = TERMS[type(objective)](policy, micro_batch, scored, objective, temperature, old)
    if not math.isfinite(float(terms.loss.detach())):
        raise NonFiniteError(_describe_loss(micro_batch, scored, float(terms.loss.detach())))
    terms.loss.backward()
    return terms, scored


class _Totals:
    """Sums over the micro-batches."""

    def __init__(self) -> None:
        self.loss = self.policy = self.kl = self.clipped = 0.0
        self.entropy = self.gap = 0.0
        self.scored_tokens = self.sampled_tokens = self.tokens = 0
        self.measured: dict[int, tuple[Measured, ...]] = {}
        """By the identity of the group."""

    def add(self, terms: Terms, scored: ScoredCompletions, micro_batch: MicroBatch) -> None:
        self.loss += float(terms.loss.detach())
        self.policy += terms.policy
        self.kl += 0.0 if terms.kl_per_token is None else float(terms.kl_per_token.sum())
        self.clipped += 0.0 if terms.clipped_per_token is None else float(terms.clipped_per_token.sum())
        self.tokens += micro_batch.tokens
        lengths = scored.completion_mask.sum(1)  # (R,)
        entropy = (scored.entropy.detach() * scored.completion_mask).sum(1)
        self.entropy += float(entropy.sum())
        self.scored_tokens += int(lengths.sum())
        means = (entropy / lengths).tolist()
        kls = [None] * len(means) if terms.kl_per_token is None else (terms.kl_per_token.sum(1) / lengths).tolist()
        logprobs, row = scored.logprobs.detach().cpu(), 0
        for group in micro_batch.groups:
            rows = range(row, row + len(group.completions))
            gaps = self._gaps(group.sampling_logprobs, logprobs[rows.start : rows.stop])
            self.measured[id(group)] = tuple(
                Measured(entropy=means[i], kl=kls[i], sampling_gap=gaps[i - rows.start]) for i in rows
            )
            row = rows.stop

    def _gaps(self, sampled: Sequence[Sequence[float]], trained: Tensor) -> list[float | None]:
        """Mean absolute difference per completion of a group; None where nothing was sampled."""
        gaps: list[float | None] = []
        for values, row in zip(sampled, trained, strict=False):
            gap = float((row[: len(values)] - torch.tensor(values, dtype=row.dtype)).abs().sum())
            self.gap += gap
            self.sampled_tokens += len(values)
            gaps.append(gap / len(values) if values else None)
        return gaps or [None] * len(trained)

    def update(self, grad_norm: float, lr: float, batch: Batch) -> Update:
        return Update(
            loss=self.loss,
            policy_loss=self.policy,
            kl=self.kl / max(1, self.scored_tokens),
            clip_fraction=self.clipped / max(1, self.scored_tokens),
            entropy=self.entropy / max(1, self.scored_tokens),
            grad_norm=grad_norm,
            lr=lr,
            sampling_gap=self.gap / self.sampled_tokens if self.sampled_tokens else None,
            skipped_groups=len(batch) - len(self.measured),
            tokens=self.tokens,
            completions=tuple(self.measured.get(id(group)) for group in batch),
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
    policy: Scorer,
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
