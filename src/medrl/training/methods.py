"""How a step gets its groups and advantages: the one difference between reinforcement and supervised training."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medrl.errors import SettingsError
from medrl.grpo import GRPO, group_advantages
from medrl.policy.policy import Policy
from medrl.rollout.collect import Ask, collect
from medrl.rollout.sampling import Sampling
from medrl.sft import SFT
from medrl.training.batches import Objective
from medrl.types import Completion, Example, Group, Groups, Mode, Reward, Rollout, Score

ANSWER_FORMS: dict[Mode, str] = {
    "think": "<think>{rationale}</think><answer>{letter}</answer>",
    "no_think": "<answer>{letter}</answer>",
    "think_after": "<answer>{letter}</answer><think>{rationale}</think>",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """One way of training."""

    collect: Callable[[Sequence[Example], int], Groups]
    """(examples, step) -> groups."""
    advantages: Callable[[Groups], Tensor]
    """groups -> (N, G)."""
    temperature: float
    """At which log-probabilities are computed."""


def grpo(policy: Policy, objective: GRPO, ask: Ask, reward: Reward, sampling: Sampling, seed: int) -> Method:
    """Sample groups and compare each completion with its group."""
    if sampling.temperature == 0:
        raise SettingsError(
            "sampling.temperature is 0 (greedy), so all completions of a prompt would be the same and teach nothing; "
            "the papers sample at 1"
        )
    if objective.kl_coef > 0:
        _ = policy.reference  # loaded here: what is wrong with it shows before a run folder is made
    return Method(
        collect=lambda examples, step: collect(
            policy, examples, ask, reward, sampling, group_size=objective.group_size, seed=seed, step=step
        ),
        advantages=lambda groups: group_advantages(groups.rewards),
        temperature=sampling.temperature,
    )


def sft(policy: Policy, objective: SFT, ask: Ask, reward: Reward, sampling: Sampling, seed: int) -> Method:
    """Imitate the right answer."""
    return Method(
        collect=lambda examples, step: demonstrate(policy, examples, ask),
        advantages=lambda groups: torch.ones(len(groups), 1, dtype=torch.float64),
        temperature=1.0,
    )


METHODS: dict[type, Callable[..., Method]] = {GRPO: grpo, SFT: sft}


def make_method(
    policy: Policy, objective: Objective, ask: Ask, reward: Reward, sampling: Sampling, seed: int
) -> Method:
    """The method an objective belongs to."""
    return METHODS[type(objective)](policy, objective, ask, reward, sampling, seed)


def demonstrate(policy: Policy, examples: Sequence[Example], ask: Ask) -> Groups:
    """One completion per example: its right answer in the form its prompt asks for, with an empty rationale."""
    groups = []
    for example in examples:
        prompt = ask(example)
        text = ANSWER_FORMS[prompt.mode].format(letter=example.target, rationale="")
        completion = Completion(
            text=text, token_ids=tuple(policy.tokenize(text)), finish_reason="stop", mode=prompt.mode
        )
        rollout = Rollout(completion=completion, score=Score(value=1.0, answer=example.target, explanation="target"))
        groups.append(Group(example=example, prompt=prompt, rollouts=(rollout,)))
    return Groups(tuple(groups))
