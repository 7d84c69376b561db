"""What a study is: data, domains, methods, seeds. One YAML file, from which every cell follows."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from medrl.data.demo import TEST_IMAGES, TRAIN_IMAGES
from medrl.data.splits import KeepTogether
from medrl.errors import SettingsError
from medrl.policy.loading import PolicySettings
from medrl.settings import Settings, load_settings, read_recipe
from medrl.training.recipe import Recipe
from medrl.types import Mode

Column = Literal["modality", "question_type", "source", "kind"]
ALL = "all"
"""The axis of one domain: everything."""


class StudyData(Settings):
    """Where questions come from: a train and a test store, one store that the study divides, or the embedded demo."""

    train: Path | None = None
    test: Path | None = None
    store: Path | None = None
    """Divided into DIR/data/train and DIR/data/test; no picture (or patient, or source) lies on both sides."""
    demo: bool = False
    """Draw the embedded demo's images; nothing is downloaded."""
    train_images: int = Field(default=TRAIN_IMAGES, ge=1)
    test_images: int = Field(default=TEST_IMAGES, ge=1)
    """How many the demo draws."""
    keep_together: KeepTogether = "image"
    test_fraction: float = Field(default=0.2, gt=0, lt=1)
    by: Literal["modality", "question_type", "source"] = "modality"
    """What train_size and test_size count in."""
    train_size: int | None = Field(default=None, ge=1)
    test_size: int | None = Field(default=None, ge=1)
    """Questions of each domain to keep; None keeps all."""
    seed: int = 0
    """Names the division."""
    keep: dict[Column, tuple[str, ...]] = Field(default={})
    """Keep only these values of a column, in train and test; e.g. ``question_type: [Modality Recognition]``."""

    @model_validator(mode="after")
    def _one_source(self) -> "StudyData":
        given = [self.demo, self.store is not None, self.train is not None or self.test is not None]
        if sum(given) != 1 or (self.train is None) != (self.test is None):
            raise ValueError("data needs one of: demo: true, store: STORE, or both train: STORE and test: STORE")
        return self


class Axis(Settings):
    """The domains of one matrix: what is trained on (rows) and tested on (columns)."""

    train: tuple[str, ...] = ()
    """Values of the column to train a specialist on; empty takes all there are."""
    test: tuple[str, ...] = ()
    """Values to test on; empty takes all there are."""


class Ask(Settings):
    """How a model that was not trained is asked."""

    mode: Mode = "think"
    template: str | None = None


class Evaluating(Settings):
    """How answers are collected, for all models alike."""

    batch_size: int = Field(default=32, ge=1)
    option_probs: bool = False
    cluster: Literal["image", "patient"] = "image"
    """What belongs together in every interval."""


class Study(Settings):
    """All settings of a study."""

    name: str = "study"
    data: StudyData
    axes: dict[Column | Literal["all"], Axis]
    """One matrix each. ``all`` is the matrix of one cell: trained on everything, tested on everything."""
    policy: PolicySettings
    """The base model, shared by all methods."""
    recipe: dict[str, Any] = Field(default={})
    """Settings shared by all methods, as in a recipe of ``medrl train``."""
    methods: dict[str, dict[str, Any]]
    """Name -> what differs from the shared recipe; ``recipe: FILE.yaml`` starts from that file instead."""
    zero_shot: dict[str, Ask] = Field(default={"zero-shot": Ask()})
    """Rows of the base model, one per way of asking. Gains are counted from the first."""
    seeds: tuple[int, ...] = (0,)
    epochs: float | None = Field(default=None, gt=0)
    """How often a specialist sees its training questions; None keeps the recipe's steps."""
    evaluation: Evaluating = Evaluating()
    launcher: tuple[str, ...] = ()
    """Words before ``train``/``eval`` of each cell, e.g. ``[python, -m, medrl]``: every cell is then a command of its
    own. Empty runs the cells in the worker's process."""

    @model_validator(mode="after")
    def _something_to_do(self) -> "Study":
        for what in ("axes", "methods", "zero_shot", "seeds"):
            if not getattr(self, what):
                raise ValueError(f"{what} is empty, but a study needs at least one")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds holds a number twice: {list(self.seeds)}")
        double = self.methods.keys() & self.zero_shot.keys()
        if double:
            raise ValueError(f"{', '.join(sorted(double))} names both a method and a zero-shot row; rename one")
        return self


def method_recipe(study: Study, method: str, train: Path, folder: Path) -> Recipe:
    """The recipe of a method before domain and seed are put in; recipe files are looked for from ``folder`` too.

    Raises SettingsError naming the method when its settings cannot mean anything.
    """
    own = dict(study.methods[method])
    file = own.pop("recipe", None)
    values: dict[str, Any] = _merge({"policy": study.policy.model_dump(mode="json")}, study.recipe)
    if file is not None:
        path = Path(file) if Path(file).exists() else folder / file
        values = _merge(values, read_recipe(path))
        values["policy"] = study.policy.model_dump(mode="json")  # one base for all: or the rows would not compare
    values = _merge(values, own)
    values["data"] = _merge(values.get("data", {}), {"train": str(train)})
    try:
        return load_settings(Recipe, values)
    except SettingsError as error:
        raise SettingsError(f"methods.{method}: {error}") from None


def _merge(values: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``changes`` laid over ``values``, section by section; a reward is replaced whole."""
    merged = dict(values)
    for key, value in changes.items():
        old = merged.get(key)
        if isinstance(value, Mapping) and isinstance(old, Mapping) and key != "reward":
            merged[key] = _merge(old, value)
        else:
            merged[key] = value
    return merged
