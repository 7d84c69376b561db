"""Collecting over ranks: each samples and scores its share of a step's prompts, and all know all of it afterwards."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from medrl.policy.policy import Policy
from medrl.rollout import collect as on_one_process
from medrl.rollout.collect import Ask, Generate
from medrl.rollout.sampling import Sampling
from medrl.training.distributed import spread, world_size
from medrl.types import Completion, Example, Group, Groups, Reward, Rollout, Score


def collect(
    policy: Policy,
    examples: Sequence[Example],
    ask: Ask,
    reward: Reward,
    sampling: Sampling,
    *,
    group_size: int,
    seed: int,
    step: int,
    generator: Generate | None = None,
) -> Groups:
    """What ``rollout.collect.collect`` gives, whoever sampled it: randomness belongs to a prompt, not to a rank."""
    options: Any = {"group_size": group_size, "seed": seed, "step": step, "generator": generator}
    if world_size() == 1:
        return on_one_process.collect(policy, examples, ask, reward, sampling, **options)

    def work(mine: list[Example]) -> list[list[dict[str, Any]]]:
        groups = on_one_process.collect(policy, mine, ask, reward, sampling, **options)
        return [[asdict(rollout) for rollout in group.rollouts] for group in groups]

    written = spread(examples, work)
    return Groups(
        tuple(
            Group(example=example, prompt=ask(example), rollouts=tuple(_rollout(plain) for plain in rollouts))
            for example, rollouts in zip(examples, written, strict=True)
        )
    )


def _rollout(plain: Mapping[str, Any]) -> Rollout:
    completion = {
        **plain["completion"],
        "token_ids": tuple(plain["completion"]["token_ids"]),
        "sampling_logprobs": tuple(plain["completion"]["sampling_logprobs"]),
    }
    return Rollout(completion=Completion(**completion), score=Score(**plain["score"]))
