"""The numbers of metrics.jsonl in TensorBoard, W&B, MLflow or trackio, through accelerate: a copy, offline, on request.

    RUN/trackers/tensorboard/   tensorboard --logdir RUN/trackers/tensorboard
    RUN/trackers/wandb/         wandb sync RUN/trackers/wandb/wandb/offline-run-*
    RUN/trackers/mlflow/        mlflow ui --backend-store-uri RUN/trackers/mlflow
    RUN/trackers/trackio/       TRACKIO_DIR=RUN/trackers/trackio trackio show

Numbers and settings only: no completion, no question, no image, no path. Nothing leaves the machine unless the
tracker's own variables say so (WANDB_MODE, MLFLOW_TRACKING_URI).
"""

import os
import re
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from medrl.errors import MissingExtraError
from medrl.runs import Run

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]
FOLDER = "trackers"
PROJECT = "medrl"
KEPT_BACK = ("data", "trackers")
"""Sections of a recipe that trackers are not told: they hold paths of the user's."""
HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")


def check_installed(names: Sequence[Tracker]) -> None:
    """Raise ``MissingExtraError`` for a tracker whose package is not there."""
    for name in names:
        if find_spec(name) is None:
            raise MissingExtraError(name, "track")


@contextmanager
def tracking(names: Sequence[Tracker], run: Run, first_step: int) -> Iterator[Callable[[int, Mapping[str, Any]], None]]:
    """Open trackers beside a run; within, call what is given with each step's number and row.

    A run that is resumed goes on in the same place; steps that were taken again are there once in TensorBoard and may
    be there twice in the others.
    """
    if names:
        from accelerate import PartialState

        PartialState()  # accelerate's trackers ask it who they are
        if "tracker_id" not in run.provenance:  # folders of two runs may have the same name
            run.update_provenance(tracker_id=uuid.uuid4().hex[:8])
    folder, own = run.path.resolve(), run.provenance.get("tracker_id", "")
    opened = [OPEN[name](folder / FOLDER / name, folder.name, own, first_step) for name in names]
    settings = told(run.recipe)
    for tracker in opened:
        tracker.start()
        if first_step == 0:
            tracker.store_init_configuration(settings)

    def log(step: int, row: Mapping[str, Any]) -> None:
        numbers = {name: value for name, value in flat(row).items() if isinstance(value, int | float)}
        numbers.pop("step")
        for tracker in opened:
            # MLflow takes no "@" in a name.
            named = {k.replace("@", "_at_"): v for k, v in numbers.items()} if tracker.name == "mlflow" else numbers
            tracker.log(named, step=step)

    try:
        yield log
    finally:
        for tracker in opened:
            tracker.finish()


def told(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What trackers are told of a recipe: the name of a model on the hub, but no path of a model or of a reward's file,
    and no address of a server."""
    kept = {name: value for name, value in recipe.items() if name not in KEPT_BACK}
    settings = flat({**kept, **({"reward": _without_folders(kept["reward"])} if "reward" in kept else {})})
    model = settings.get("policy/model", "")
    if not HUB_ID.fullmatch(model) or Path(model).exists():
        settings.pop("policy/model", None)
    settings.pop("rollout/endpoint", None)
    return settings


def _without_folders(reward: Any) -> Any:
    """``FILE.py:FUNCTION`` by the file's own name."""
    if isinstance(reward, Mapping):
        return {_without_folders(name): _without_folders(value) for name, value in reward.items()}
    return Path(reward).name if isinstance(reward, str) and ".py:" in reward else reward


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under names with slashes; lists as text, None left out."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}/")
        elif isinstance(value, list | tuple):
            found[prefix + name] = ", ".join(map(str, value))
        elif value is not None:
            found[prefix + name] = value
    return found


def _tensorboard(folder: Path, name: str, own: str, first_step: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    # What a killed run had logged beyond its checkpoint is struck out.
    return TensorBoardTracker(name, folder, purge_step=first_step)


def _wandb(folder: Path, name: str, own: str, first_step: int) -> Any:
    from accelerate.tracking import WandBTracker

    folder.mkdir(parents=True, exist_ok=True)
    mode: Any = os.environ.get("WANDB_MODE", "offline")
    return WandBTracker(
        PROJECT, name=name, id=own, dir=str(folder), mode=mode, resume="allow", save_code=False, settings=WANDB_TELLS
    )


WANDB_TELLS = {
    "host": "-",
    "x_disable_meta": True,
    "x_disable_machine_info": True,
    "x_disable_stats": True,
    "disable_git": True,
    "console": "off",
    "silent": True,
}
"""W&B would also write down the user, the host, the command line and what the terminal shows."""


def _mlflow(folder: Path, name: str, own: str, first_step: int) -> Any:
    from accelerate.tracking import MLflowTracker

    # MLflow calls its file store finished and would have a database; files need no server and no migration.
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    folder.mkdir(parents=True, exist_ok=True)
    known = folder / "run_id"
    place = os.environ.get("MLFLOW_TRACKING_URI", folder.as_uri())

    class Remembering(MLflowTracker):
        """Continues the run it began."""

        def start(self) -> None:
            import_module("mlflow").set_tracking_uri(place)
            super().start()
            known.write_text(self.active_run.info.run_id, encoding="utf-8")

    run_id = known.read_text(encoding="utf-8") if first_step and known.is_file() else None
    return Remembering(experiment_name=PROJECT, logging_dir=place, run_id=run_id, run_name=name)


def _trackio(folder: Path, name: str, own: str, first_step: int) -> Any:
    from accelerate.tracking import TrackioTracker

    os.environ.setdefault("TRACKIO_DIR", str(folder))
    return TrackioTracker(PROJECT, name=f"{name}-{own}", resume="allow")  # it has no other id


OPEN: dict[Tracker, Callable[[Path, str, str, int], Any]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}
