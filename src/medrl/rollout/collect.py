"""Examples -> scored groups: the one place where policy and reward meet."""

import math
from collections.abc import Callable, Sequence

from medrl.errors import NonFiniteError
from medrl.policy.policy import Policy
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling
from medrl.types import Completion, Example, Group, Groups, Prompt, Reward, Rollout, Score

Generate = Callable[..., list[list[Completion]]]
"""``engine.generate`` or a server's: (policy, prompts, sampling, group_size=, seed=, step=) -> completions."""
Ask = Callable[[Example], Prompt]
"""Example -> prompt, with mode and template already chosen."""


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
    """Complete each example's prompt ``group_size`` times and score the completions.

    ``generator`` None is the policy itself, in this process.

    Raises ``NonFiniteError`` naming the example when a log-probability or a reward is NaN or infinite.
    """
    prompts = [ask(example) for example in examples]
    completions = (generator or generate)(policy, prompts, sampling, group_size=group_size, seed=seed, step=step)
    for prompt, group in zip(prompts, completions, strict=True):
        check_finite(prompt, group)
    return Groups(
        tuple(
            Group(
                example=example,
                prompt=prompt,
                rollouts=tuple(
                    Rollout(completion=completion, score=score(reward, example, completion)) for completion in group
                ),
            )
            for example, prompt, group in zip(examples, prompts, completions, strict=True)
        )
    )


def check_finite(prompt: Prompt, completions: Sequence[Completion]) -> None:
    """Refuse completions that were drawn from something that is no distribution."""
    if not all(math.isfinite(value) for completion in completions for value in completion.sampling_logprobs):
        raise NonFiniteError(
            f"the policy's log-probabilities are not finite for example {prompt.id}: look at its images, or at the "
            "weights, which may have diverged: resume from an earlier checkpoint with a lower optim.lr"
        )


def score(reward: Reward, example: Example, completion: Completion) -> Score:
    """``reward(example, completion)``, checked to be a finite number, and its parts too."""
    result = reward(example, completion)
    if not all(map(math.isfinite, (result.value, *result.parts.values()))):
        raise NonFiniteError(
            f"the reward of example {example.id} is {result.value} (parts {result.parts}) for the completion "
            f"{completion.text!r}: a reward must be a finite number"
        )
    return result
