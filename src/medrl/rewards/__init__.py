"""Rewards: pure functions of an example and a completion."""

from medrl.rewards.choose import default_weights, load_function, make_reward
from medrl.rewards.combine import (
    PARTS,
    BySource,
    PartFunction,
    WeightedReward,
    check_gold,
    check_wrong,
    from_weights,
    gold_completion,
    weighted,
)
from medrl.rewards.correctness import (
    answer_correct,
    bleu,
    box_iou,
    choice_correct,
    embedding_similarity,
    option_overlap,
    rouge_l,
    token_f1,
)
from medrl.rewards.format import well_formed
from medrl.rewards.guard import guarded
from medrl.rewards.kinds import read_answer
from medrl.rewards.parse import Answer, parse_answer
from medrl.rewards.scorers import SCORERS, find_scorer
from medrl.rewards.shaping import brief, brief_up_to, implied_option, names_option, no_repetition, think_agrees

__all__ = [
    "PARTS",
    "SCORERS",
    "Answer",
    "BySource",
    "PartFunction",
    "WeightedReward",
    "answer_correct",
    "bleu",
    "box_iou",
    "brief",
    "brief_up_to",
    "check_gold",
    "check_wrong",
    "choice_correct",
    "default_weights",
    "embedding_similarity",
    "find_scorer",
    "from_weights",
    "gold_completion",
    "guarded",
    "implied_option",
    "load_function",
    "make_reward",
    "names_option",
    "no_repetition",
    "option_overlap",
    "parse_answer",
    "read_answer",
    "rouge_l",
    "think_agrees",
    "token_f1",
    "weighted",
    "well_formed",
]
