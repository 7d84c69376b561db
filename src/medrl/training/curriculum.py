"""A curriculum by pass rate: how often the policy gets each question right before it is trained, and what follows from
it.

rates = pass_rates(run, policy, train_set, ...)      once, k completions per question, kept in the run folder
train_set, ranks = arrange(train_set, rates, curriculum)
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from pydantic import Field, model_validator

from medrl.errors import DataError
from medrl.policy.policy import Policy
from medrl.progress import Progress
from medrl.rollout.collect import Ask, Generate
from medrl.rollout.sampling import Sampling
from medrl.runs import Run
from medrl.settings import Settings
from medrl.training.collecting import collect
from medrl.training.monitors import is_right
from medrl.types import Example, Group, Reward

BEFORE_TRAINING = -1
"""The step whose randomness the estimate uses: none that trains."""


class Curriculum(Settings):
    """Which questions are asked, and in which order, by how often the untrained policy gets them right.

    Source of the idea in this field: MedVLThinker, arXiv 2508.02669 (16 completions, all-wrong and all-right left out,
    easy before hard).
    """

    use: Literal["none", "filter", "order", "both"] = "none"
    """``filter``: leave out what lies outside the bounds; ``order``: easy before hard, in every epoch; ``both``."""
    rollouts: int = Field(default=8, ge=1)
    """Completions per question (k) for the estimate."""
    lowest: float = Field(default=0.01, ge=0, le=1)
    """Questions with a lower pass rate are left out: what is never right teaches nothing yet."""
    highest: float = Field(default=0.99, ge=0, le=1)
    """Questions with a higher pass rate are left out: what is always right teaches nothing any more."""

    @model_validator(mode="after")
    def _some_rate_is_between(self) -> Self:
        if self.lowest > self.highest:
            raise ValueError(f"lowest is {self.lowest:g}, above highest, which is {self.highest:g}: swap them")
        return self


def pass_rates(
    run: Run,
    policy: Policy,
    examples: Sequence[Example],
    ask: Ask,
    reward: Reward,
    sampling: Sampling,
    curriculum: Curriculum,
    *,
    seed: int,
    batch_size: int,
    generator: Generate | None = None,
    quiet: bool = False,
) -> dict[str, float]:
    """Share of right answers among ``curriculum.rollouts`` completions of each example, by id.

    Estimated with the policy as it is now. Every batch is written down at once, so an estimate that was stopped
    continues; a completion does not depend on the batch it is in, so it ends as it would have.
    """
    known = {row["id"]: row["right"] / row["rollouts"] for row in run.pass_rates()}
    missing = [example for example in examples if example.id not in known]
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    with Progress(len(batches), noun="pass rates, batch", quiet=quiet) as progress:
        for batch in batches:
            groups = collect(
                policy, batch, ask, reward, sampling,
                group_size=curriculum.rollouts, seed=seed, step=BEFORE_TRAINING, generator=generator,
            )  # fmt: skip
            rows = [{"id": g.example.id, "right": count_right(g), "rollouts": curriculum.rollouts} for g in groups]
            run.append_pass_rates(rows)
            known |= {row["id"]: row["right"] / row["rollouts"] for row in rows}
            progress.advance({})
    return {example.id: known[example.id] for example in examples}


def count_right(group: Group) -> int:
    """How many completions of a group answered rightly."""
    return sum(is_right(group.example, rollout) for rollout in group.rollouts)


def arrange(
    examples: Sequence[Example], rates: Mapping[str, float], curriculum: Curriculum
) -> tuple[list[Example], list[float] | None]:
    """The examples to train on and, where they are to be ordered, a rank for each: the lowest is asked first.

    Raises ``DataError`` when the bounds leave nothing.
    """
    kept = list(examples)
    if curriculum.use in ("filter", "both"):
        kept = [example for example in examples if curriculum.lowest <= rates[example.id] <= curriculum.highest]
    if not kept:
        never = sum(rates[example.id] == 0 for example in examples)
        always = sum(rates[example.id] == 1 for example in examples)
        raise DataError(
            f"no question has a pass rate from {curriculum.lowest:g} to {curriculum.highest:g}: of {len(examples)}, "
            f"{never} are never right and {always} always; widen training.curriculum.lowest and highest, or start from "
            "another policy"
        )
    return kept, [1 - rates[example.id] for example in kept] if curriculum.use in ("order", "both") else None
