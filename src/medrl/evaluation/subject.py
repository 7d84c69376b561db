"""Which model is meant, how it was trained to be asked, and its evaluation on a store.

A model is a model folder, a hub id, a run folder (its newest checkpoint that verifies), a checkpoint folder, or
``demo-base``. What is known of the run it comes from fills in what the caller leaves open.
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from medrl.data import store
from medrl.errors import DataError, RunError
from medrl.evaluation.evaluate import EvalSettings, Evaluation, evaluate_store
from medrl.policy.loading import Dtype, PolicySettings
from medrl.policy.policy import Policy
from medrl.runs import Run, is_evaluation, is_run, read_summary
from medrl.settings import load_settings
from medrl.training.checkpoint import latest_checkpoint
from medrl.training.manifest import MANIFEST, verify
from medrl.training.recipe import Recipe
from medrl.training.settings import Training
from medrl.types import Mode


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model to evaluate."""

    source: str
    """What ``Policy.load`` opens."""
    name: str
    """What the summary calls it: an absolute folder, a hub id, or ``demo-base``."""
    training: Training | None = None
    """How the run it comes from asked; None when it comes from none."""
    policy: PolicySettings | None = None
    """How that run loaded it; None when the run was started from Python."""
    train: Path | None = None
    """The store that run was trained on."""


def find_subject(model: str) -> Subject:
    """What ``model`` stands for.

    Raises ``RunError`` for a run without a checkpoint, ``CheckpointError`` for a checkpoint that does not verify.
    """
    folder = Path(model)
    if is_run(folder):
        checkpoint = latest_checkpoint(folder / "checkpoints", set_aside=False)
        if checkpoint is None:
            raise RunError(f"the run {folder} has no checkpoint yet: continue it with 'medrl train --resume auto'")
        return _from_run(folder, checkpoint)
    if (folder / MANIFEST).is_file():
        verify(folder)
        run = folder.resolve().parent.parent
        return _from_run(run, folder) if is_run(run) else Subject(source=str(folder), name=str(folder.resolve()))
    return Subject(source=model, name=str(folder.resolve()) if folder.is_dir() else model)


def _from_run(folder: Path, checkpoint: Path) -> Subject:
    recipe = Run.open(folder).recipe
    source, name = str(checkpoint), str(checkpoint.resolve())
    if "policy" not in recipe:  # started from Python, which knows no recipe
        settings = {key: value for key, value in recipe.items() if key not in ("objective", "reward")}
        return Subject(source=source, name=name, training=load_settings(Training, settings))
    recipe = load_settings(Recipe, folder / "recipe.yaml")
    return Subject(
        source=source, name=name, training=recipe.training, policy=recipe.policy, train=_present(recipe.data.train)
    )


def _present(train: Path) -> Path | None:
    if (train / "store.json").is_file():
        return train
    warnings.warn(
        f"the run's training store {train} is not here, so the blind baselines that are fit on it are left out; "
        "give it with --train",
        stacklevel=2,
    )
    return None


def evaluate_model(
    model: str,
    test: Path,
    *,
    out: Path,
    mode: Mode | None = None,
    template: str | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 32,
    option_probs: bool = True,
    dtype: Dtype | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    train: Path | None = None,
    limit: int | None = None,
    quiet: bool = False,
) -> Evaluation:
    """Evaluate ``model`` on the store ``test``; None takes what its run used, or the default.

    Raises what ``find_subject`` and ``evaluate_store`` raise, ``DataError`` for stores that are none (before the model
    is loaded), and ``RunError`` when ``out`` holds the evaluation of another model.
    """
    store.read_info(test)
    if train is not None:
        store.read_info(train)
    if out.exists() and not out.is_dir():
        raise DataError(f"{out} is a file; an evaluation needs a folder: choose another --out")
    subject = find_subject(model)
    _refuse_other_model(out, subject.name)
    asked, loaded = subject.training or Training(), subject.policy
    mode = mode or asked.mode
    settings = EvalSettings(
        mode=mode,
        template=template or (asked.template if mode == asked.mode else None),
        max_new_tokens=max_new_tokens or asked.sampling.max_new_tokens,
        batch_size=batch_size,
        option_probs=option_probs,
    )
    policy = Policy.load(
        subject.source,
        dtype=dtype or (loaded.dtype if loaded else _usual_dtype()),
        min_pixels=min_pixels or (loaded.min_pixels if loaded else None),
        max_pixels=max_pixels or (loaded.max_pixels if loaded else None),
    )
    return evaluate_store(
        policy, test, out=out, model=subject.name, train=train or subject.train, limit=limit, settings=settings,
        quiet=quiet,
    )  # fmt: skip


def _usual_dtype() -> Dtype:
    return "bfloat16" if torch.cuda.is_available() else "float32"


def _refuse_other_model(out: Path, name: str) -> None:
    """Records are kept when they answer the same prompts, whoever answered them."""
    before = read_summary(out).get("model") if is_evaluation(out) else None
    if before not in (None, name):
        raise RunError(f"{out} holds the evaluation of {before}, not of {name}: choose another --out")
