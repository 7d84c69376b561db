"""Settings of group-relative policy optimization."""

from typing import Literal

from pydantic import field_validator

from medrl.settings import Settings


class GRPO(Settings):
    """Group-relative policy optimization (DeepSeekMath, arXiv 2402.03300).

    The defaults are those of TRL 0.14, with which both papers were run; they sampled 4 completions per prompt.
    """

    group_size: int = 8
    """Completions per prompt (G)."""
    kl_coef: float = 0.04
    """Weight of the KL to the reference; 0 loads no reference."""
    clip_low: float = 0.2
    """The ratio of new to old probability counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high; larger than clip_low is DAPO's "clip-higher", arXiv 2503.14476."""
    reduction: Literal["sequence", "token"] = "sequence"
    """``sequence``: every completion counts the same (GRPO); ``token``: every token counts the same (DAPO)."""
    updates_per_rollout: int = 1
    """Optimizer steps on the same completions; 1 is on-policy and needs no pass for the old log-probabilities."""

    @field_validator("group_size")
    @classmethod
    def _a_group_can_be_compared(cls, value: int) -> int:
        if value < 2:
            raise ValueError(
                f"group_size is {value}, but a group needs at least 2 completions: "
                "the advantage of a lone completion is always 0"
            )
        return value

    @field_validator("kl_coef")
    @classmethod
    def _the_kl_pulls_towards_the_reference(cls, value: float) -> float:
        if value < 0:
            raise ValueError(
                f"kl_coef is {value:g}, but it must be at least 0: a negative weight would push the policy away "
                "from the reference (0 trains without a reference)"
            )
        return value

    @field_validator("clip_low")
    @classmethod
    def _the_ratio_stays_positive(cls, value: float) -> float:
        if not 0 < value <= 1:
            raise ValueError(f"clip_low is {value:g}, but it must be above 0 and at most 1: a ratio is never negative")
        return value

    @field_validator("clip_high")
    @classmethod
    def _the_ratio_has_room_to_grow(cls, value: float) -> float:
        if value <= 0:
            raise ValueError(
                f"clip_high is {value:g}, but it must be above 0: otherwise no completion is ever reinforced"
            )
        return value

    @field_validator("updates_per_rollout")
    @classmethod
    def _completions_are_used(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"updates_per_rollout is {value}, but it must be at least 1")
        return value
