"""Which model is meant, how it was trained to be asked, and its evaluation on a store.

A model is a model folder, a hub id, a run folder (its newest checkpoint that verifies), a checkpoint folder, or
``demo-base``. What is known of the run it comes from fills in what the caller leaves open.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, Unpack

import torch

from medrl.data import store
from medrl.data.prompts import TEMPLATES
from medrl.errors import DataError, RunError, SettingsError
from medrl.evaluation.answer import reading_ahead
from medrl.evaluation.evaluate import EvalSettings, Evaluation, evaluate_store
from medrl.evaluation.shards import Shard
from medrl.policy.layers import Compilation
from medrl.policy.loading import Dtype, PolicySettings
from medrl.policy.policy import Policy
from medrl.rollout.endpoint import Endpoint
from medrl.runs import Run, is_evaluation, is_run, read_summary
from medrl.settings import load_settings
from medrl.training.ahead import Ahead, Processes
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
    """Training settings of the run it comes from: mode, template, lengths; None without a run."""
    policy: PolicySettings | None = None
    """That run's ``policy`` settings; None when it was started from Python."""
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


COMPILED_FROM = 10_000
"""Questions from which a minute of compiling the layers should pay on a GPU, at a few milliseconds a question."""


class Wishes(TypedDict, total=False):
    """Settings from the command line; those left out come from the model's run, else from ``EvalSettings``."""

    mode: Mode | None
    max_new_tokens: int | None
    batch_size: int
    option_probs: bool
    samples: int
    temperature: float | None
    top_p: float
    top_k: int
    seed: int
    data_workers: int | None
    data_processes: Processes
    dtype: Dtype | None
    compile_layers: Compilation
    min_pixels: int | None
    max_pixels: int | None
    train: Path | None
    limit: int | None
    endpoint: Endpoint | None
    """Ask the server there instead of loading the model."""
    shard: Shard | None


def evaluate_model(
    model: str, test: Path, *, out: Path, template: str | None = None, quiet: bool = False, **wishes: Unpack[Wishes]
) -> Evaluation:
    """Evaluate ``model`` on the store ``test``; None takes what its run used, or the default.

    Raises what ``find_subject`` and ``evaluate_store`` raise, ``DataError`` for stores that are none (before the model
    is loaded), and ``RunError`` when ``out`` holds the evaluation of another model.
    """
    return evaluate_templates(model, test, {template: out}, quiet=quiet, **wishes)[template]


def evaluate_templates(
    model: str, test: Path, outs: Mapping[str | None, Path], *, quiet: bool = False, **wishes: Unpack[Wishes]
) -> dict[str | None, Evaluation]:
    """Evaluate ``model`` in several wordings, loading it once: one evaluation per template, each in its own folder."""
    questions = min(store.read_info(test).rows, wishes.get("limit") or sys.maxsize) * len(outs)
    train, endpoint = wishes.get("train"), wishes.get("endpoint")
    if train is not None:
        store.read_info(train)
    subject = find_subject(model)
    settings = {template: _settings(subject, template, wishes) for template in outs}
    for out in outs.values():
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is a file; an evaluation needs a folder: choose another --out")
        _refuse_other_model(out, subject.name)
    policy = _load(subject, wishes) if endpoint is None else _checked(endpoint, wishes)
    with _prepared(policy, settings[next(iter(outs))], wishes, questions) as ahead:
        return {
            template: evaluate_store(
                policy,
                test,
                out=out,
                model=subject.name,
                train=train or subject.train,
                limit=wishes.get("limit"),
                settings=settings[template],
                shard=wishes.get("shard"),
                ahead=ahead,
                quiet=quiet,
            )
            for template, out in outs.items()
        }


@contextmanager
def _prepared(
    policy: Policy | Endpoint, settings: EvalSettings, wishes: Wishes, questions: int
) -> Iterator[Ahead | None]:
    """Within, a policy's layers are compiled; what reads ahead for it starts meanwhile."""
    if isinstance(policy, Endpoint):
        yield None
        return
    wanted = wishes.get("compile_layers", "auto")
    with reading_ahead(policy, settings) as ahead:
        policy.compile_layers(False if wanted == "auto" and questions < COMPILED_FROM else wanted, to_train=False)
        yield ahead


def _settings(subject: Subject, template: str | None, wishes: Wishes) -> EvalSettings:
    asked = subject.training or Training()
    # A wording asks for one mode, so naming it is enough.
    wanted = TEMPLATES[template].mode if template in TEMPLATES else asked.mode
    mode = wishes.get("mode") or wanted
    chosen = {key: wishes[key] for key in EvalSettings.model_fields.keys() & wishes.keys()}
    return EvalSettings(
        **{
            **chosen,
            "mode": mode,
            "template": template or (asked.template if mode == asked.mode else None),
            "max_new_tokens": wishes.get("max_new_tokens") or asked.sampling.max_new_tokens,
        }
    )


def _load(subject: Subject, wishes: Wishes) -> Policy:
    loaded = subject.policy
    return Policy.load(
        subject.source,
        dtype=wishes.get("dtype") or (loaded.dtype if loaded else _usual_dtype()),
        device=_own_device(),
        min_pixels=wishes.get("min_pixels") or (loaded.min_pixels if loaded else None),
        max_pixels=wishes.get("max_pixels") or (loaded.max_pixels if loaded else None),
    )


def _checked(endpoint: Endpoint, wishes: Wishes) -> Endpoint:
    """The endpoint, where nothing is wished for that only who loads the model can do."""
    meant = [name for name in ("dtype", "min_pixels", "max_pixels") if wishes.get(name) is not None]
    if meant:
        options = ", ".join("--" + name.replace("_", "-") for name in meant)
        raise SettingsError(f"{options} cannot be chosen behind an endpoint: set it where the server is started")
    return endpoint


def _own_device() -> str | None:
    """The GPU of this process where a launcher started several; None leaves the choice to the policy."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if rank is not None and torch.cuda.is_available() else None


def _usual_dtype() -> Dtype:
    return "bfloat16" if torch.cuda.is_available() else "float32"


def _refuse_other_model(out: Path, name: str) -> None:
    """Records are kept when they answer the same prompts, whoever answered them."""
    before = read_summary(out).get("model") if is_evaluation(out) else None
    if before not in (None, name):
        raise RunError(f"{out} holds the evaluation of {before}, not of {name}: choose another --out")
