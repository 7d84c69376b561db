"""What a micro-batch contributes to a step's loss, by objective: one visible table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medrl.grpo import GRPO, policy_loss
from medrl.phases import phase
from medrl.policy.policy import Policy, ScoredCompletions
from medrl.sft import SFT, cross_entropy
from medrl.training.batches import MicroBatch


@dataclass(frozen=True, slots=True)
class Terms:
    """A micro-batch's share of the step's loss, and of the numbers that are reported with it."""

    loss: Tensor
    policy: float
    kl: float
    clip_fraction: float


def _grpo(
    policy: Policy,
    micro_batch: MicroBatch,
    scored: ScoredCompletions,
    objective: GRPO,
    temperature: float,
    old: Tensor | None,
) -> Terms:
    ref_logprobs = None
    if objective.kl_coef > 0:
        with torch.no_grad(), phase("reference"):
            reference = policy.reference.logprobs(micro_batch.encoded, micro_batch.completions, temperature=temperature)
        ref_logprobs = reference.logprobs
    device = scored.logprobs.device
    terms = policy_loss(
        scored.logprobs,
        micro_batch.advantages.to(device),
        scored.completion_mask,
        micro_batch.weights.to(device),
        objective,
        old_logprobs=old,
        ref_logprobs=ref_logprobs,
    )
    return Terms(terms.loss, float(terms.policy), float(terms.kl), float(terms.clip_fraction))


def _sft(
    policy: Policy,
    micro_batch: MicroBatch,
    scored: ScoredCompletions,
    objective: SFT,
    temperature: float,
    old: Tensor | None,
) -> Terms:
    loss = cross_entropy(scored.logprobs, scored.completion_mask, micro_batch.weights.to(scored.logprobs.device))
    return Terms(loss, float(loss.detach()), 0.0, 0.0)


TERMS: dict[type, Callable[..., Terms]] = {GRPO: _grpo, SFT: _sft}
