"""medrl: reinforcement learning for medical vision-language models. Research use only.

The public names, loaded when they are first used: ``import medrl`` alone imports neither torch nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from medrl import rewards
    from medrl.api import compare, evaluate, write_report
    from medrl.data.prompts import make_prompt
    from medrl.data.splits import split_examples
    from medrl.data.store import load, write_store
    from medrl.errors import MedrlError
    from medrl.evaluation.audit import Audit, audit
    from medrl.evaluation.compare import Comparison
    from medrl.evaluation.evaluate import EvalSettings, Evaluation
    from medrl.grpo import GRPO
    from medrl.policy.policy import Policy
    from medrl.rollout.collect import collect
    from medrl.rollout.engine import generate
    from medrl.rollout.sampling import Sampling
    from medrl.runs import Run
    from medrl.sft import RFT, SFT
    from medrl.training.curriculum import Curriculum
    from medrl.training.optim import Optim
    from medrl.training.recipe import Recipe, run_recipe
    from medrl.training.train import Training, train
    from medrl.types import Completion, EvalRecord, Example, Group, Groups, Prompt, Reward, Rollout, Score

__version__ = "0.1.0"

__all__ = [
    "GRPO",
    "RFT",
    "SFT",
    "Audit",
    "Comparison",
    "Completion",
    "Curriculum",
    "EvalRecord",
    "EvalSettings",
    "Evaluation",
    "Example",
    "Group",
    "Groups",
    "MedrlError",
    "Optim",
    "Policy",
    "Prompt",
    "Recipe",
    "Reward",
    "Rollout",
    "Run",
    "Sampling",
    "Score",
    "Training",
    "__version__",
    "audit",
    "collect",
    "compare",
    "evaluate",
    "generate",
    "load",
    "make_prompt",
    "rewards",
    "run_recipe",
    "split_examples",
    "train",
    "write_report",
    "write_store",
]

_MODULES = {
    "medrl.api": ("compare", "evaluate", "write_report"),
    "medrl.data.prompts": ("make_prompt",),
    "medrl.data.splits": ("split_examples",),
    "medrl.data.store": ("load", "write_store"),
    "medrl.errors": ("MedrlError",),
    "medrl.evaluation.audit": ("Audit", "audit"),
    "medrl.evaluation.compare": ("Comparison",),
    "medrl.evaluation.evaluate": ("EvalSettings", "Evaluation"),
    "medrl.grpo": ("GRPO",),
    "medrl.policy.policy": ("Policy",),
    "medrl.rollout.collect": ("collect",),
    "medrl.rollout.engine": ("generate",),
    "medrl.rollout.sampling": ("Sampling",),
    "medrl.runs": ("Run",),
    "medrl.sft": ("RFT", "SFT"),
    "medrl.training.curriculum": ("Curriculum",),
    "medrl.training.optim": ("Optim",),
    "medrl.training.recipe": ("Recipe", "run_recipe"),
    "medrl.training.train": ("Training", "train"),
    "medrl.types": ("Completion", "EvalRecord", "Example", "Group", "Groups", "Prompt", "Reward", "Rollout", "Score"),
}
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name == "rewards":
        return import_module("medrl.rewards")
    if name not in _HOME:
        raise AttributeError(f"module 'medrl' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
