"""A recipe: one YAML file that says what to train, on what, how. ``run_recipe`` turns it into a run."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medrl.data import store
from medrl.data.prompts import find_template
from medrl.errors import DataError
from medrl.grpo import GRPO
from medrl.policy.loading import PolicySettings
from medrl.policy.policy import load_policy
from medrl.rewards import default_weights, make_reward
from medrl.rewards.choose import describe_files
from medrl.rollout.served import Rollouts
from medrl.runs import Run, check_unlocked, check_vacant
from medrl.settings import Settings, load_settings
from medrl.sft import RFT, SFT
from medrl.training.batches import Objective
from medrl.training.distributed import Scale, from_first, joined, world_size
from medrl.training.settings import Training
from medrl.training.start import Resume, check_hours
from medrl.training.trackers import Tracker
from medrl.training.train import train
from medrl.types import Example, Kind

MOMENT = 1e-9
"""Hours that are left where loading took all there were: the run stops at its first safe point."""
FILTERS = ("modality", "question_type", "source", "kind")
"""Columns a recipe may choose values of."""


class Data(Settings):
    """What is trained on."""

    train: Path
    """A store; ``medrl import`` and ``medrl split`` make them."""
    modality: tuple[str, ...] = ()
    """Keep only these; empty keeps all."""
    question_type: tuple[str, ...] = ()
    """Keep only these; empty keeps all."""
    source: tuple[str, ...] = ()
    """Keep only these; empty keeps all."""
    kind: tuple[Kind, ...] = ()
    """Keep only these; empty keeps all."""
    limit: int | None = Field(default=None, ge=1)
    """Keep only the first this many, after the filters."""


class Recipe(Settings):
    """All settings of a run."""

    method: Literal["grpo", "sft", "rft"] = "grpo"
    policy: PolicySettings
    data: Data
    reward: str | dict[str, Any] | None = None
    """Parts of the reward and their weights, ``FILE.py:FUNCTION``, or rewards ``by_source``: docs/rewards.md. None:
    right answer and right form, with ``choice_correct`` where all questions are choices, else ``answer_correct``; the
    recipe that the run keeps says which."""
    grpo: GRPO = GRPO()
    sft: SFT = SFT()
    rft: RFT = RFT()
    training: Training = Training()
    rollout: Rollouts = Rollouts()
    scale: Scale = Scale()
    trackers: tuple[Tracker, ...] = ()
    """Where else the numbers of metrics.jsonl go: tensorboard, wandb, mlflow, trackio."""

    @property
    def objective(self) -> Objective:
        return {"grpo": self.grpo, "sft": self.sft, "rft": self.rft}[self.method]


def run_recipe(
    recipe: Path,
    overrides: Sequence[str] = (),
    *,
    out: Path,
    resume: Resume = "never",
    max_hours: float | None = None,
    quiet: bool = False,
) -> Run:
    """Train what ``recipe`` says into the run folder ``out``; ``overrides`` are ``key=value`` with dotted keys."""
    settings = load_settings(Recipe, recipe, overrides)
    folders = (Path(), recipe.parent)
    return run_settings(settings, out=out, resume=resume, max_hours=max_hours, quiet=quiet, folders=folders)


def run_settings(
    settings: Recipe,
    *,
    out: Path,
    resume: Resume = "never",
    max_hours: float | None = None,
    quiet: bool = False,
    folders: Sequence[Path] = (Path(),),
) -> Run:
    """The same for settings that are already loaded; reward functions are looked for in ``folders``, in order."""
    with joined():
        return _run(settings, out, resume, max_hours, quiet, folders)


def _run(
    settings: Recipe, out: Path, resume: Resume, max_hours: float | None, quiet: bool, folders: Sequence[Path]
) -> Run:
    started = time.monotonic()
    check_hours(max_hours)
    from_first(lambda: check_unlocked(out))  # before a model of gigabytes is loaded
    if resume == "never":
        from_first(lambda: check_vacant(out))
    if settings.reward is not None:
        make_reward(settings.reward, folders)  # wrong words show before the data are read
    find_template(settings.training.mode, settings.training.template)
    rows = store.load(settings.data.train)
    # A file that was damaged shows now, not at the step that draws it.
    fingerprint = from_first(lambda: store.verify(settings.data.train, rows).fingerprint)
    train_set = select(rows, settings.data)
    spec = settings.reward if settings.reward is not None else default_weights(row.kind for row in train_set)
    settings = settings.model_copy(update={"reward": spec})
    reward, reward_files = make_reward(spec, folders), describe_files(spec, folders)
    policy = load_policy(_without_fsdp(settings))
    loading_hours = (time.monotonic() - started) / 3600
    return train(
        policy,
        train_set,
        reward,
        settings.objective,
        out=out,
        settings=settings.training,
        recipe=settings,
        provenance={"data_fingerprint": fingerprint, "train_rows": len(train_set)}
        | ({"reward_files": reward_files} if reward_files else {}),
        root=settings.data.train,
        resume=resume,
        max_hours=None if max_hours is None else max(MOMENT, max_hours - loading_hours),
        quiet=quiet,
        rollout=settings.rollout,
        scale=settings.scale,
        trackers=settings.trackers,
    )


def _without_fsdp(settings: Recipe) -> PolicySettings:
    """The policy's settings; layers whose weights lie in pieces are not compiled, so ``auto`` is no there."""
    pieces = settings.scale.strategy == "fsdp" and world_size() > 1
    if pieces and settings.policy.compile_layers == "auto":
        return settings.policy.model_copy(update={"compile_layers": False})
    return settings.policy


def select(examples: Sequence[Example], data: Data) -> list[Example]:
    """The examples a recipe keeps. Raises ``DataError`` naming what there is when a filter keeps none."""
    kept = list(examples)
    for field in FILTERS:
        wanted = getattr(data, field)
        present = sorted({getattr(example, field) for example in examples})
        unknown = [name for name in wanted if name not in present]
        if unknown:
            raise DataError(f"data.{field} asks for {', '.join(unknown)}, but {data.train} has {', '.join(present)}")
        kept = [example for example in kept if not wanted or getattr(example, field) in wanted]
    if not kept:
        raise DataError(f"no example of {data.train} passes {', '.join(f'data.{field}' for field in FILTERS)} together")
    return kept[: data.limit]
