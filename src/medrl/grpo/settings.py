"""Settings of group-relative policy optimization."""

from typing import Any, Literal, Self

from pydantic import field_validator, model_validator

from medrl.grpo.algorithms import ALGORITHMS, Algorithm, AlgorithmName
from medrl.settings import Settings


class GRPO(Settings):
    """Group-relative policy optimization (DeepSeekMath, arXiv 2402.03300) and its relatives.

    The defaults are those of TRL 0.14, with which both papers were run; they sampled 4 completions per prompt. Naming
    an ``algorithm`` sets what it does differently (the table in ``algorithms.py``); whatever is given besides goes
    before that.
    """

    algorithm: AlgorithmName = "grpo"
    """A row of the table in ``grpo/algorithms.py``; ``paper`` is what Med-R1 and MedVLM-R1 ran."""
    group_size: int = 8
    """Completions per prompt (G)."""
    kl_coef: float = 0.04
    """Weight of the KL to the reference, in the loss or (``rloo``, ``reinforce++``) in the reward; 0 loads no
    reference."""
    clip_low: float = 0.2
    """The ratio of new to old probability counts down to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts up to 1 + clip_high; larger than clip_low is DAPO's "clip-higher", arXiv 2503.14476."""
    reduction: Literal["sequence", "token", "constant"] = "sequence"
    """``sequence``: every completion counts the same (GRPO); ``token``: every token counts the same (DAPO);
    ``constant``: the sum over a completion's tokens counts, divided by the longest allowed length (Dr. GRPO)."""
    updates_per_rollout: int = 1
    """Optimizer steps on the same completions; 1 is on-policy and needs no pass for the old log-probabilities."""
    entropy_coef: float = 0.0
    """Weight of the mean entropy per token, which is added to what grows: against a collapse onto one way of
    writing."""
    dynamic_sampling: int = 0
    """Draw prompts anew in place of groups whose rewards are all equal, in at most this many rounds; 0 or 1 takes what
    comes.
    Source: DAPO, arXiv 2503.14476, section 3.2."""
    overlong_share: float = 0.0
    """The reward falls by up to 1 over this last share of ``max_new_tokens``; 0 does not look at the length. Source:
    DAPO."""
    balance: Literal["none", "modality", "question_type", "source"] = "none"
    """Make advantages louder for domains that are rare and hard so far. Source: DRPO (QoQ-Med), arXiv 2506.00711."""
    sampling_cap: float = 2.0
    """Where a server writes the completions (``rollout.endpoint``): the most a token counts for being likelier in the
    training pass than the server drew it. Source: Yao et al. 2025, truncated importance sampling."""
    sync_reference_every: int = 0
    """Steps after which the reference moves towards the policy; 0 keeps it frozen. Source: TR-DPO, arXiv 2404.09656."""
    sync_reference_mix: float = 0.6
    """How far it moves: 1 makes it the policy."""

    @property
    def row(self) -> Algorithm:
        """Its row of the table."""
        return ALGORITHMS[self.algorithm]

    @model_validator(mode="before")
    @classmethod
    def _an_algorithm_brings_its_defaults(cls, values: Any) -> Any:
        row = ALGORITHMS.get(values.get("algorithm", "grpo")) if isinstance(values, dict) else None
        return {**row.defaults, **values} if row else values

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

    @field_validator("sampling_cap")
    @classmethod
    def _an_agreeing_sampler_counts_in_full(cls, value: float) -> float:
        if value < 1:
            raise ValueError(
                f"sampling_cap is {value:g}, but it must be at least 1: lower, it would weaken every token"
            )
        return value

    @field_validator("updates_per_rollout")
    @classmethod
    def _completions_are_used(cls, value: int) -> int:
        if value < 1:
            raise ValueError(f"updates_per_rollout is {value}, but it must be at least 1")
        return value

    @field_validator("entropy_coef", "dynamic_sampling", "sync_reference_every")
    @classmethod
    def _nothing_below_zero(cls, value: float) -> float:
        if value < 0:
            raise ValueError(f"it is {value:g}, but it must be at least 0 (0 leaves it out)")
        return value

    @field_validator("overlong_share", "sync_reference_mix")
    @classmethod
    def _a_share(cls, value: float) -> float:
        if not 0 <= value <= 1:
            raise ValueError(f"it is {value:g}, but a share is at least 0 and at most 1")
        return value

    @model_validator(mode="after")
    def _the_settings_fit_the_algorithm(self) -> Self:
        if self.row.on_policy and self.updates_per_rollout > 1:
            raise ValueError(
                f"updates_per_rollout is {self.updates_per_rollout}, but algorithm '{self.algorithm}' is on-policy and "
                "has no clip: use 'grpo', which is the same with one update, or set updates_per_rollout to 1"
            )
        if self.row.by_completion and self.reduction != "sequence":
            raise ValueError(
                f"reduction is '{self.reduction}', but algorithm '{self.algorithm}' has one ratio per completion: "
                "set reduction to 'sequence'"
            )
        if self.sync_reference_every and not self.kl_coef:
            raise ValueError(
                "sync_reference_every moves a reference, but kl_coef is 0, which loads none: "
                "set kl_coef, or leave it out"
            )
        return self
