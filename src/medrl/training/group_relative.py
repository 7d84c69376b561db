"""Reinforcement: sample groups, compare each completion with its group, and what some algorithms do around that."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Self

import torch
from torch import Tensor

from medrl.errors import SettingsError
from medrl.grpo import GRPO, balance_advantages, domain_scales, k1_kl, overlong_penalty
from medrl.policy.lora import has_lora
from medrl.policy.policy import Policy
from medrl.rollout.sampling import Sampling
from medrl.training.batches import Batch, pack_groups
from medrl.training.collecting import collect
from medrl.training.distributed import spread
from medrl.training.setup import Setup
from medrl.types import Example, Group, Groups, Rollout

Draw = Callable[[int], list[Example]]
"""The next so many examples."""
REFERENCE = "reference."
"""Prefix of the reference's weights in a checkpoint; they are there only where the reference moves."""


@dataclass
class GroupRelative:
    """GRPO and its relatives: the table in ``grpo/algorithms.py``."""

    objective: GRPO
    setup: Setup
    domains: dict[str, list[float]] = field(default_factory=dict)
    """Prompts seen and the sum of their mean rewards, by domain: what ``balance`` looks at."""

    @classmethod
    def start(cls, objective: GRPO, setup: Setup) -> Self:
        check_warm(setup.sampling)
        if objective.sync_reference_every and has_lora(setup.policy.model):
            raise SettingsError(
                "grpo.sync_reference_every moves the reference, but with policy.lora the reference is the model "
                "without its adapters, which stays: set sync_reference_every to 0, or train without policy.lora"
            )
        if objective.kl_coef > 0:
            _ = setup.policy.reference  # loaded here: what is wrong with it shows before a run folder is made
        return cls(objective, setup)

    @property
    def policy(self) -> Policy:
        return self.setup.policy

    @property
    def temperature(self) -> float:
        """At which log-probabilities are computed."""
        return self.setup.sampling.temperature

    def collect(self, draw: Draw, step: int) -> Groups:
        """Sample, drop what teaches nothing where that is asked for, shape the rewards."""
        groups = self._sample(draw, step)
        if self.objective.balance != "none":
            self._count(groups)
        if self.objective.overlong_share > 0:
            groups = shape_overlong(groups, self.setup.sampling.max_new_tokens, self.objective.overlong_share)
        if self.objective.row.kl_in_reward and self.objective.kl_coef > 0:
            groups = charge_kl(groups, self.policy, self.objective.kl_coef, self.temperature)
        return groups

    def advantages(self, groups: Groups) -> Tensor:
        """(N, G) by the algorithm, louder for rare and hard domains where that is asked for."""
        advantages = self.objective.row.advantages(groups.rewards)
        if self.objective.balance == "none":
            return advantages
        seen = [self.domains[self._domain(group)] for group in groups]
        scales = domain_scales([int(count) for count, _ in seen], [total / count for count, total in seen])
        return balance_advantages(advantages, scales)

    def pack(self, groups: Groups, advantages: Tensor) -> Batch:
        return pack_groups(groups, advantages, sampled_elsewhere=self.setup.server is not None)

    def finish(self, step: int) -> None:
        """Move the reference after the update of ``step``, where it moves."""
        every = self.objective.sync_reference_every
        if every and (step + 1) % every == 0:
            mix_into(self.policy.reference, self.policy, self.objective.sync_reference_mix)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What a checkpoint must hold so that a resumed run goes on as it would have."""
        moves = self.objective.sync_reference_every > 0
        weights = dict(self.policy.reference.model.named_parameters()) if moves else {}
        return {REFERENCE + name: weight for name, weight in weights.items()}, {"domains": self.domains}

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        self.domains = {name: list(seen) for name, seen in state.get("domains", {}).items()}
        if self.objective.sync_reference_every:
            for name, weight in self.policy.reference.model.named_parameters():
                weight.copy_(tensors[REFERENCE + name])

    def _sample(self, draw: Draw, step: int) -> Groups:
        kept: list[Group] = []
        dropped: list[Group] = []
        rounds, setup = max(1, self.objective.dynamic_sampling), self.setup
        for _ in range(rounds):
            groups = collect(
                setup.policy, draw(setup.prompts_per_step - len(kept)), setup.ask, setup.reward, setup.sampling,
                group_size=self.objective.group_size, seed=setup.seed, step=step, generator=setup.generator,
            )  # fmt: skip
            if rounds == 1:
                return groups
            for group in groups:
                (kept if _teaches(group) else dropped).append(group)
            if len(kept) == self.setup.prompts_per_step:
                break
        # Nothing in all rounds taught anything: the step has to hold something, and what it holds has no advantage.
        return Groups(tuple(kept), tuple(dropped)) if kept else Groups(tuple(dropped[-1:]), tuple(dropped[:-1]))

    def _count(self, groups: Groups) -> None:
        for group in (*groups.items, *groups.dropped):
            seen = self.domains.setdefault(self._domain(group), [0, 0.0])
            seen[0] += 1
            seen[1] += fmean(rollout.score.value for rollout in group.rollouts)

    def _domain(self, group: Group) -> str:
        return str(getattr(group.example, self.objective.balance))


def check_warm(sampling: Sampling) -> None:
    """Refuse to compare completions that are all the same."""
    if sampling.temperature == 0:
        raise SettingsError(
            "sampling.temperature is 0 (greedy), so all completions of a prompt would be the same and teach nothing; "
            "the papers sample at 1"
        )


def shape_overlong(groups: Groups, max_new_tokens: int, share: float) -> Groups:
    """Rewards less the soft overlong punishment over the last ``share`` of the allowed length; a part ``overlong`` says
    it."""
    buffer = max(1, round(share * max_new_tokens))
    lengths = torch.tensor([[len(rollout.completion.token_ids) for rollout in group.rollouts] for group in groups])
    return _add_to_rewards(groups, "overlong", overlong_penalty(lengths, max_new_tokens, buffer).tolist(), weight=1.0)


@torch.no_grad()
def charge_kl(groups: Groups, policy: Policy, kl_coef: float, temperature: float) -> Groups:
    """Rewards less ``kl_coef`` times the completion's KL to the reference (k1, summed over its tokens); the part is
    ``kl``.

    The policy's side is what the sampler wrote down. Raises ``SettingsError`` where it wrote nothing.
    """

    def charge(group: Group) -> list[float]:
        completions = [rollout.completion for rollout in group.rollouts]
        if not all(completion.sampling_logprobs for completion in completions):
            raise SettingsError(
                "this algorithm takes the KL off the reward, which needs the sampler's log-probabilities, but these "
                "completions have none: set grpo.kl_coef to 0, or use an algorithm with the KL in the loss (grpo)"
            )
        encoded = policy.encode([group.prompt])
        reference = policy.reference.logprobs(encoded, [[c.token_ids for c in completions]], temperature=temperature)
        sampled = [torch.tensor(c.sampling_logprobs, dtype=torch.float64) for c in completions]
        rows = [row[: len(s)].double().cpu() for row, s in zip(reference.logprobs, sampled, strict=True)]
        return [float(k1_kl(s, row).sum()) for s, row in zip(sampled, rows, strict=True)]

    totals = spread(groups.items, lambda mine: [charge(group) for group in mine])
    return _add_to_rewards(groups, "kl", totals, weight=-kl_coef)


def _add_to_rewards(groups: Groups, part: str, values: list[list[float]], weight: float) -> Groups:
    shaped = []
    for group, row in zip(groups, values, strict=True):
        rollouts = tuple(_add(rollout, part, value, weight) for rollout, value in zip(group.rollouts, row, strict=True))
        shaped.append(replace(group, rollouts=rollouts))
    return Groups(tuple(shaped), groups.dropped)


def _add(rollout: Rollout, part: str, value: float, weight: float) -> Rollout:
    """The score's value stays: whether a group's answers are equally good is not asked of its lengths or its KL."""
    score = replace(rollout.score, parts={**rollout.score.parts, part: value})
    return replace(rollout, score=score, shaping=rollout.shaping + weight * value)


@torch.no_grad()
def mix_into(reference: Policy, policy: Policy, mix: float) -> None:
    """reference = mix * policy + (1 - mix) * reference, weight by weight. Source: TR-DPO, arXiv 2404.09656, eq. 3."""
    weights = dict(policy.model.named_parameters())
    for name, weight in reference.model.named_parameters():
        wide = torch.promote_types(weight.dtype, torch.float32)  # a small step is lost in the 8 bits of a bfloat16
        weight.copy_(
            torch.lerp(weight.to(wide), weights[name].to(weight.device, wide), mix) if mix < 1 else weights[name]
        )


def _teaches(group: Group) -> bool:
    return len({rollout.score.value for rollout in group.rollouts}) > 1
