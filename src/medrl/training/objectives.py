"""What a micro-batch contributes to a step's loss, by objective: one visible table."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from medrl.grpo import GRPO, policy_loss
from medrl.phases import phase
from medrl.policy.policy import Policy, ScoredCompletions
from medrl.policy.transfer import bring
from medrl.sft import RFT, SFT, cross_entropy
from medrl.training.batches import MicroBatch
from medrl.training.scorer import Scorer


@dataclass(frozen=True, slots=True)
class Terms:
    """A micro-batch's share of the step's loss, and of the numbers that are reported with it."""

    loss: Tensor
    policy: Tensor
    """() without gradient. Not yet a number: who reads it waits for the device, which is not to wait for the backward
    pass that is still to be handed over."""
    kl_per_token: Tensor | None = None
    """(R, T) without gradient; None without a reference."""
    clipped_per_token: Tensor | None = None
    """(R, T) 1.0 where a ratio was clipped; None where there is no ratio."""
    sampling_weight: Tensor | None = None
    """(R, T) what corrects for a sampler that was another program; None where the policy sampled itself."""
    sampling_capped: Tensor | None = None
    """(R, T) 1.0 where that was cut off."""


def _grpo(
    policy: Policy,
    micro_batch: MicroBatch,
    scored: ScoredCompletions,
    objective: GRPO,
    temperature: float,
    old: Tensor | None,
) -> Terms:
    ref_logprobs = None
    if objective.kl_coef > 0 and not objective.row.kl_in_reward:
        with torch.no_grad(), phase("reference"):
            reference = policy.reference.logprobs(micro_batch.encoded, micro_batch.completions, temperature=temperature)
        ref_logprobs = reference.logprobs
    device, sampled = scored.logprobs.device, micro_batch.sampling_logprobs
    terms = policy_loss(
        scored.logprobs,
        bring(micro_batch.advantages, device),
        scored.completion_mask,
        bring(micro_batch.weights, device),
        objective,
        old_logprobs=old,
        ref_logprobs=ref_logprobs,
        entropy=scored.entropy,
        entropy_weight=micro_batch.entropy_weight,
        sampling_logprobs=None if sampled is None else bring(sampled, device),
    )
    return Terms(
        terms.loss,
        terms.policy,
        None if ref_logprobs is None else terms.kl_per_token,
        terms.clipped_per_token,
        terms.sampling_weight,
        terms.sampling_capped,
    )


def _imitation(
    policy: Scorer,
    micro_batch: MicroBatch,
    scored: ScoredCompletions,
    objective: SFT | RFT,
    temperature: float,
    old: Tensor | None,
) -> Terms:
    loss = cross_entropy(scored.logprobs, scored.completion_mask, bring(micro_batch.weights, scored.logprobs.device))
    return Terms(loss, loss.detach())


TERMS: dict[type, Callable[..., Terms]] = {GRPO: _grpo, SFT: _imitation, RFT: _imitation}
