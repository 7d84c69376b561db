"""Rewards: pure functions of an example and a completion."""

from medrl.rewards.combine import (
    PARTS,
    PartFunction,
    WeightedReward,
    check_gold,
    from_weights,
    gold_completion,
    weighted,
)
from medrl.rewards.correctness import choice_correct
from medrl.rewards.format import well_formed
from medrl.rewards.parse import Answer, parse_answer

__all__ = [
    "PARTS",
    "Answer",
    "PartFunction",
    "WeightedReward",
    "check_gold",
    "choice_correct",
    "from_weights",
    "gold_completion",
    "parse_answer",
    "weighted",
    "well_formed",
]
