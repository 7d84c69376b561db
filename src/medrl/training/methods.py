"""How a step gets its groups and advantages: the one difference between reinforcement and supervised training.

groups = method.collect(draw, step)         what was written
advantages = method.advantages(groups)      (N, G): how much of each completion is to be learned
batch = method.pack(groups, advantages)     what the update trains on
method.finish(step)                         what moves after the update, e.g. the reference
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from medrl.data.prompts import demonstration
from medrl.errors import DataError, SettingsError
from medrl.grpo import GRPO
from medrl.policy.loading import check_trainable
from medrl.policy.policy import Policy
from medrl.rollout.collect import Ask
from medrl.rollout.sampling import Sampling
from medrl.rollout.served import Server
from medrl.sft import RFT, SFT
from medrl.training.batches import Batch, Objective, TrainingGroup, pack_groups
from medrl.training.collecting import collect
from medrl.training.group_relative import Draw, GroupRelative, check_warm
from medrl.training.monitors import is_right
from medrl.training.released import RELEASED, ReleasedTurns
from medrl.training.setup import Setup
from medrl.types import Completion, Example, Group, Groups, Mode, Reward, Rollout, Score


class Stateless:
    """A method that remembers nothing from step to step."""

    def finish(self, step: int) -> None:
        """Nothing moves but the policy."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {}, {}

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Nothing to restore."""


@dataclass
class Supervised(Stateless):
    """Imitate the right answer: cross-entropy on its tokens, none on the prompt's."""

    policy: Policy | ReleasedTurns
    objective: SFT
    ask: Ask
    prompts_per_step: int
    temperature: float = 1.0

    @classmethod
    def start(cls, objective: SFT, setup: Setup) -> Self:
        turns = ReleasedTurns(setup.policy) if objective.emulate != "none" else setup.policy
        return cls(turns, objective, setup.ask, setup.prompts_per_step)

    def collect(self, draw: Draw, step: int) -> Groups:
        """One completion per example: its right answer in the form its prompt asks for."""
        return demonstrate(self.policy, draw(self.prompts_per_step), self.ask, self.objective)

    def advantages(self, groups: Groups) -> Tensor:
        """(N, 1) ones."""
        return torch.ones(len(groups), 1, dtype=torch.float64)

    def pack(self, groups: Groups, advantages: Tensor) -> Batch:
        if isinstance(self.policy, ReleasedTurns):
            return self.policy.pack(groups)
        return pack_groups(groups, advantages)


@dataclass
class RejectionSampling(Stateless):
    """Imitate the best of what the policy itself wrote, where the best is right. Source: see ``RFT``."""

    objective: RFT
    setup: Setup

    @classmethod
    def start(cls, objective: RFT, setup: Setup) -> Self:
        check_warm(setup.sampling)
        return cls(objective, setup)

    @property
    def policy(self) -> Policy:
        return self.setup.policy

    @property
    def temperature(self) -> float:
        """At which log-probabilities are computed."""
        return self.setup.sampling.temperature

    def collect(self, draw: Draw, step: int) -> Groups:
        """Sampled as for GRPO, so that the two can be compared at the same cost."""
        setup = self.setup
        return collect(
            setup.policy, draw(setup.prompts_per_step), setup.ask, setup.reward, setup.sampling,
            group_size=self.objective.group_size, seed=setup.seed, step=step, generator=setup.generator,
        )  # fmt: skip

    def advantages(self, groups: Groups) -> Tensor:
        """(N, G): 1 for what is kept, 0 for the rest."""
        return torch.tensor([keep_best(group, self.objective.keep) for group in groups], dtype=torch.float64)

    def pack(self, groups: Groups, advantages: Tensor) -> Batch:
        """Only what is kept; a prompt without a right completion has no part in the step."""
        kept = []
        for group in pack_groups(groups, advantages):
            chosen = [i for i, advantage in enumerate(group.advantages) if advantage]
            if chosen:
                kept.append(
                    TrainingGroup(
                        prompt=group.prompt,
                        completions=tuple(group.completions[i] for i in chosen),
                        advantages=tuple(group.advantages[i] for i in chosen),
                        sampling_logprobs=tuple(group.sampling_logprobs[i] for i in chosen),
                    )
                )
        return tuple(kept)


Method = GroupRelative | Supervised | RejectionSampling


def keep_best(group: Group, keep: str) -> list[float]:
    """1.0 for each completion of a group to imitate: right answers only; with ``best`` one of them."""
    right = [i for i, r in enumerate(group.rollouts) if is_right(group.example, r)]
    if keep == "best" and right:
        scores = [(-group.rollouts[i].score.value, len(group.rollouts[i].completion.token_ids), i) for i in right]
        right = [min(scores)[2]]
    return [float(i in right) for i in range(len(group.rollouts))]


METHODS: dict[type, Callable[..., Method]] = {
    GRPO: GroupRelative.start,
    SFT: Supervised.start,
    RFT: RejectionSampling.start,
}


def make_method(
    policy: Policy,
    objective: Objective,
    ask: Ask,
    reward: Reward,
    sampling: Sampling,
    seed: int,
    prompts_per_step: int,
    server: Server | None = None,
) -> Method:
    """The method an objective belongs to.

    Raises ``SettingsError`` for a server that would have nothing to write, and for a precision that nothing trains in.
    """
    check_trainable(str(policy.family.head.dtype).removeprefix("torch."))
    if server is not None and isinstance(objective, SFT):
        raise SettingsError("supervised training samples nothing, so it cannot use a rollout server: leave out rollout")
    setup = Setup(
        policy=policy, ask=ask, reward=reward, sampling=sampling, seed=seed, prompts_per_step=prompts_per_step,
        server=server,
    )  # fmt: skip
    return METHODS[type(objective)](objective, setup)


def demonstrate(
    policy: Policy | ReleasedTurns, examples: Sequence[Example], ask: Ask, objective: SFT | None = None
) -> Groups:
    """One completion per example: its right answer in the form its prompt asks for, with its rationale if that is
    wanted."""
    groups = []
    for example in examples:
        prompt = ask(example)
        text = _target_text(example, prompt.mode, objective or SFT())
        completion = Completion(
            text=text, token_ids=tuple(policy.tokenize(text)), finish_reason="stop", mode=prompt.mode
        )
        rollout = Rollout(completion=completion, score=Score(value=1.0, answer=example.target, explanation="target"))
        groups.append(Group(example=example, prompt=prompt, rollouts=(rollout,)))
    return Groups(tuple(groups), sampled=False)


def _target_text(example: Example, mode: Mode, objective: SFT) -> str:
    if objective.emulate != "none":
        return RELEASED.format(letter=example.target)
    return demonstration(example, mode, rationale=objective.rationale == "column")


def check_demonstrations(examples: Sequence[Example], mode: Mode, objective: Objective) -> None:
    """Refuse supervised training that cannot show what it promises, before anything is written.

    Raises ``DataError`` naming examples without the rationale that is asked for, ``SettingsError`` for settings that
    contradict each other. Warns where what is shown is not well-formed.
    """
    if not isinstance(objective, SFT):
        return
    if objective.emulate != "none" and objective.rationale != "none":
        raise SettingsError("sft.emulate writes its own answers, so sft.rationale cannot be used with it: choose one")
    if objective.emulate != "none" and mode != "no_think":
        raise SettingsError(
            f"sft.emulate {objective.emulate} writes answers without reasoning, but training.mode is {mode}: "
            "set it to no_think"
        )
    other = next((example for example in examples if example.kind != "choice"), None)
    if objective.emulate != "none" and other is not None:
        raise DataError(
            f"sft.emulate {objective.emulate} knows only letters, but example {other.id!r} is of kind {other.kind}: "
            "set sft.emulate to none"
        )
    if mode == "no_think":
        return
    if objective.rationale == "none":
        warnings.warn(
            f"training.mode is {mode}, but sft.rationale is none: this teaches an empty reasoning block, which is not "
            "well-formed; set training.mode to no_think, or sft.rationale to column",
            stacklevel=2,
        )
        return
    without = [example.id for example in examples if not (example.rationale or "").strip()]
    if without:
        raise DataError(
            f"sft.rationale is 'column', but {len(without)} of {len(examples)} examples have no rationale "
            f"({', '.join(without[:5])}): fill that column of the store, or set sft.rationale to none"
        )
