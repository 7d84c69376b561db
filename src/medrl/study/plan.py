"""Settings and stores -> the cells of a study: every training and every evaluation, each with a folder of its own.

A cell's folder is named for what it is and for a hash of all that decides its result, so that the same work is found
again and other work never takes its place.
"""

import functools
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from medrl.data import store
from medrl.data.prompts import find_template
from medrl.data.splits import slug
from medrl.errors import DataError, SettingsError
from medrl.policy.loading import resolve_model
from medrl.rewards import make_reward
from medrl.rewards.choose import describe_files, locate_files
from medrl.runs import CELLS
from medrl.settings import dump_settings
from medrl.study.settings import ALL, Ask, Study, method_recipe
from medrl.study.stores import Stores
from medrl.training.recipe import Recipe
from medrl.types import Example

Kind = Literal["train", "eval"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One training or one evaluation."""

    id: str
    """Name and hash: the folder under ``DIR/cells``."""
    kind: Kind
    method: str
    """Of the methods, or of the zero-shot rows."""
    axis: str | None
    domain: str | None
    """What it was trained on; axis and domain are None for the base, which serves every axis."""
    seed: int | None
    recipe: Recipe
    """What is trained; for an evaluation what the model was, or would have been, trained with."""
    ask: Ask
    needs: str | None = None
    """Cell that must be done before: the training of the model that is evaluated."""

    def folder(self, out: Path) -> Path:
        return out / CELLS / self.id

    def result(self, out: Path) -> Path:
        """Run folder or evaluation folder."""
        return self.folder(out) / ("run" if self.kind == "train" else "eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """All cells of a study, in the order in which they are taken up."""

    study: Study
    stores: Stores
    rows: dict[str, list[str]]
    """Axis -> domains trained on."""
    columns: dict[str, list[str]]
    """Axis -> domains tested on."""
    cells: list[Cell]
    n_train: dict[str, dict[str, int]]
    """Axis -> domain -> training questions."""
    n_test: int

    def find(self, method: str, axis: str | None, domain: str | None, seed: int | None) -> Cell:
        """The evaluation of one model."""
        wanted = ("eval", method, axis, domain, seed)
        return next(c for c in self.cells if (c.kind, c.method, c.axis, c.domain, c.seed) == wanted)


def make_plan(study: Study, stores: Stores, folder: Path = Path()) -> Plan:
    """Work out every cell; nothing is run.

    Args:
        folder: where recipe files of methods, and reward files, are looked for as well as here.

    Raises SettingsError for methods that cannot mean anything, DataError for domains that are not in the data.
    """
    train, test = store.load(stores.train), store.load(stores.test)
    prints = [store.read_info(path).fingerprint for path in (stores.train, stores.test)]
    rows = {name: _choose(name, axis.train, train, stores.train) for name, axis in study.axes.items()}
    columns = {name: _choose(name, axis.test, test, stores.test) for name, axis in study.axes.items()}
    n_train = {axis: {domain: _count(train, axis, domain) for domain in rows[axis]} for axis in rows}
    recipes = {name: method_recipe(study, name, stores.train, folder) for name in study.methods}
    folders = (Path(), folder)
    for recipe in recipes.values():
        find_template(recipe.training.mode, recipe.training.template)
        if recipe.reward is not None:
            make_reward(recipe.reward, folders)  # wrong words show before anything runs
    cells = []
    for name, ask in study.zero_shot.items():
        find_template(ask.mode, ask.template)
        cells.append(_evaluation(study, name, _base_recipe(study, recipes), ask, prints))
    for seed in study.seeds:
        for axis, domains in rows.items():
            for domain in domains:
                for name, recipe in recipes.items():
                    specialist = _specialize(recipe, study, axis, domain, seed, n_train[axis][domain])
                    trained = _training(name, axis, domain, seed, specialist, prints[0], folders)
                    cells += [trained, _evaluation(study, name, specialist, trained.ask, prints, trained)]
    return Plan(
        study=study,
        stores=stores,
        rows=rows,
        columns=columns,
        cells=cells,
        n_train=n_train,
        n_test=len(test),
    )


def domain_of(example: Any, axis: str) -> str:
    """Which domain of an axis an example or a record belongs to."""
    return ALL if axis == ALL else str(getattr(example, axis))


@functools.cache
def model_fingerprint(model: str) -> str:
    """sha256 over the files of a model folder; a hub id stands for itself."""
    folder = Path(resolve_model(model))
    if not folder.is_dir():
        return model
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.json"), *folder.glob("*.safetensors"), *folder.glob("*.jinja")]):
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()


def _choose(axis: str, wanted: Sequence[str], examples: Sequence[Example], path: Path) -> list[str]:
    present = sorted({domain_of(example, axis) for example in examples})
    unknown = [domain for domain in wanted if domain not in present]
    if unknown:
        raise DataError(f"axes.{axis} asks for {', '.join(unknown)}, but {path} has {', '.join(present)}")
    slugs = [slug(domain) for domain in wanted or present]
    if len(set(slugs)) < len(slugs):
        raise SettingsError(f"two domains of {axis} need the same folder name: {', '.join(sorted(slugs))}; rename one")
    return list(wanted or present)


def _count(examples: Sequence[Example], axis: str, domain: str) -> int:
    return sum(domain_of(example, axis) == domain for example in examples)


def _specialize(recipe: Recipe, study: Study, axis: str, domain: str, seed: int, n_train: int) -> Recipe:
    values = dump_settings(recipe)
    if axis != ALL:
        values["data"][axis] = [domain]
    values["training"]["seed"] = seed
    if study.epochs is not None:
        n_train = min(n_train, recipe.data.limit or n_train)
        values["training"]["steps"] = max(1, math.ceil(study.epochs * n_train / recipe.training.prompts_per_step))
    return Recipe(**values)


def _base_recipe(study: Study, recipes: Mapping[str, Recipe]) -> Recipe:
    """Where the base model and the longest completion stand; the base is asked with as much room as the methods."""
    first = next(iter(recipes.values()))
    longest = max(recipe.training.sampling.max_new_tokens for recipe in recipes.values())
    sampling = first.training.sampling.model_copy(update={"max_new_tokens": longest})
    training = first.training.model_copy(update={"sampling": sampling})
    return first.model_copy(update={"policy": study.policy, "training": training})


def _training(
    method: str, axis: str, domain: str, seed: int, recipe: Recipe, data: str, folders: Sequence[Path]
) -> Cell:
    values = dump_settings(recipe)
    del values["data"]["train"]  # where store and model lie changes nothing; what is in them does
    values["policy"]["model"] = model_fingerprint(recipe.policy.model)
    if recipe.reward is not None:
        files = describe_files(recipe.reward, folders)
        values |= {"reward_files": files} if files else {}
        recipe = recipe.model_copy(update={"reward": locate_files(recipe.reward, folders)})
    name = f"train-{slug(axis)}-{slug(domain)}-{slug(method)}-{seed}"
    ask = Ask(mode=recipe.training.mode, template=recipe.training.template)
    return Cell(
        id=_id(name, values, data), kind="train", method=method, axis=axis, domain=domain, seed=seed, recipe=recipe,
        ask=ask,
    )  # fmt: skip


def _evaluation(
    study: Study, method: str, recipe: Recipe, ask: Ask, prints: list[str], trained: Cell | None = None
) -> Cell:
    """The whole test set, once; every axis slices the same answers."""
    decides = {
        "ask": dump_settings(ask),
        "batch_size": study.evaluation.batch_size,
        "option_probs": study.evaluation.option_probs,
        "policy": {**dump_settings(recipe.policy), "model": model_fingerprint(recipe.policy.model)},
        "tokens": recipe.training.sampling.max_new_tokens,
        "model": trained.id if trained else None,
    }
    name = f"eval-base-{slug(method)}" if trained is None else trained.id.rpartition("-")[0].replace("train", "eval", 1)
    axis, domain, seed = (trained.axis, trained.domain, trained.seed) if trained else (None, None, None)
    return Cell(
        id=_id(name, decides, *prints), kind="eval", method=method, axis=axis, domain=domain, seed=seed,
        recipe=recipe, ask=ask, needs=trained.id if trained else None,
    )  # fmt: skip


def _id(name: str, *decides: Any) -> str:
    return f"{name}-{hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:8]}"
