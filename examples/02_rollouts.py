"""Ask a small model two questions about real images, four times each, and compare each completion with its group."""

import tempfile
from pathlib import Path

from medrl import Policy, Sampling, collect, make_prompt
from medrl.data.demo import build_examples
from medrl.grpo import group_advantages
from medrl.rewards import choice_correct, weighted, well_formed

with tempfile.TemporaryDirectory() as folder:
    examples = build_examples("train", 2, seed=0, folder=Path(folder))[:2]
    groups = collect(
        Policy.load("demo-base"),
        examples,
        lambda example: make_prompt(example, "think", "plain"),
        weighted((1.0, choice_correct), (1.0, well_formed)),
        Sampling(temperature=1.0, max_new_tokens=40),
        group_size=4,
        seed=0,
        step=0,
    )

for group, advantages in zip(groups, group_advantages(groups.rewards).tolist(), strict=True):
    example = group.example
    print(f"\n{example.question} {', '.join(example.options)} (right: {example.target_text}, {example.target})")
    for rollout, advantage in zip(group.rollouts, advantages, strict=True):
        print(f"  advantage {advantage:+.2f}  reward {rollout.score.value:.0f}  {rollout.completion.text}")
