"""What an update measures: sums over micro-batches and ranks -> Update, and what it says of each completion."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from medrl.errors import NonFiniteError
from medrl.policy.policy import ScoredCompletions
from medrl.training.batches import Batch, MicroBatch
from medrl.training.objectives import Terms


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the training pass says of one completion: means over its tokens, in nats."""

    entropy: float
    kl: float | None
    """None without a reference in the loss."""
    sampling_gap: float | None
    """Mean absolute difference between the sampler's log-probabilities and the training pass's; None if not sampled."""

    @property
    def finite(self) -> bool:
        return all(math.isfinite(value) for value in (self.entropy, self.kl, self.sampling_gap) if value is not None)


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
    sampling_weight: float | None = None
    """Mean over tokens of what corrects for a sampler that was another program; None where there was none."""
    sampling_capped: float | None = None
    """Share of tokens whose correction was cut off at ``sampling_cap``."""
    skipped_groups: int
    """Groups without a gradient, which cost no pass."""
    tokens: int
    """Tokens that went through the training pass."""
    completions: tuple[tuple[Measured, ...] | None, ...] = ()
    """Per group of the batch, in order, each of its completions; None for a group that was skipped."""


SUMS = (
    "loss", "policy", "kl", "clipped", "entropy", "gap", "weight", "capped", "scored_tokens", "sampled_tokens",
    "corrected_tokens", "tokens",
)  # fmt: skip


class Totals:
    """Sums over the micro-batches, and over the ranks."""

    def __init__(self) -> None:
        self.loss = self.policy = self.kl = self.clipped = 0.0
        self.entropy = self.gap = self.weight = self.capped = 0.0
        self.scored_tokens = self.sampled_tokens = self.corrected_tokens = self.tokens = 0
        self.measured: dict[int, tuple[Measured, ...]] = {}
        """By the identity of the group."""
        self.logprobs: list[Tensor] = []
        """(T,) of every completion: what later updates on the same completions compare with."""

    def add(self, terms: Terms, scored: ScoredCompletions, micro_batch: MicroBatch, old: Tensor | None) -> None:
        self.loss += float(terms.loss.detach())
        self.policy += float(terms.policy)
        self.kl += 0.0 if terms.kl_per_token is None else float(terms.kl_per_token.sum())
        self.clipped += 0.0 if terms.clipped_per_token is None else float(terms.clipped_per_token.sum())
        self.tokens += micro_batch.tokens
        lengths = scored.completion_mask.sum(1)  # (R,)
        entropy = (scored.entropy.detach() * scored.completion_mask).sum(1)
        self.entropy += float(entropy.sum())
        self.scored_tokens += int(lengths.sum())
        if terms.sampling_weight is not None and terms.sampling_capped is not None:
            self.weight += float(terms.sampling_weight.sum())
            self.capped += float(terms.sampling_capped.sum())
            self.corrected_tokens += int(lengths.sum())
        means = (entropy / lengths).tolist()
        kls = [None] * len(means) if terms.kl_per_token is None else (terms.kl_per_token.sum(1) / lengths).tolist()
        self.logprobs += [row[: int(n)] for row, n in zip(scored.logprobs.detach(), lengths.tolist(), strict=True)]
        # The sampler is compared with the policy that it was when it sampled.
        logprobs, row = (scored.logprobs if old is None else old).detach().cpu(), 0
        for group in micro_batch.groups:
            rows = range(row, row + len(group.completions))
            gaps = self._gaps(group.sampling_logprobs, logprobs[rows.start : rows.stop])
            self.measured[id(group)] = tuple(
                Measured(entropy=means[i], kl=kls[i], sampling_gap=gaps[i - rows.start]) for i in rows
            )
            row = rows.stop
            for measured in self.measured[id(group)]:
                if not measured.finite:
                    raise NonFiniteError(
                        f"not all numbers of example {group.prompt.id} are finite: {measured}. No weight was changed: "
                        "look at its images and rewards, or lower optim.lr"
                    )

    def _gaps(self, sampled: Sequence[Sequence[float]], trained: Tensor) -> list[float | None]:
        """Mean absolute difference per completion of a group; None where nothing was sampled."""
        gaps: list[float | None] = []
        for values, row in zip(sampled, trained, strict=False):
            gap = float((row[: len(values)] - torch.tensor(values, dtype=row.dtype)).abs().sum())
            self.gap += gap
            self.sampled_tokens += len(values)
            gaps.append(gap / len(values) if values else None)
        return gaps or [None] * len(trained)

    def plain(self, batch: Batch) -> dict[str, Any]:
        """The sums, and what was measured by place in the batch, as JSON: what a rank tells the others."""
        measured = [
            [i, [asdict(one) for one in self.measured[id(g)]]] for i, g in enumerate(batch) if id(g) in self.measured
        ]
        return {"sums": {name: getattr(self, name) for name in SUMS}, "measured": measured}

    @classmethod
    def together(cls, parts: Sequence[Mapping[str, Any]], batch: Batch) -> "Totals":
        """The sums of all ranks."""
        totals = cls()
        for name in SUMS:
            setattr(totals, name, sum(part["sums"][name] for part in parts))
        for part in parts:
            for place, rows in part["measured"]:
                totals.measured[id(batch[place])] = tuple(Measured(**row) for row in rows)
        return totals

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
            sampling_weight=self.weight / self.corrected_tokens if self.corrected_tokens else None,
            sampling_capped=self.capped / self.corrected_tokens if self.corrected_tokens else None,
            skipped_groups=len(batch) - len(self.measured),
            tokens=self.tokens,
            completions=tuple(self.measured.get(id(group)) for group in batch),
        )
