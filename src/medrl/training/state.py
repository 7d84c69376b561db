"""The whole of a run that moves: what is saved, brought back, and taken back when a step is left half-way.

state = RunState(run, policy, optimizer, sampler, method, settings)
first_step = state.restore()
with state.saved_when_stopped():
    for step in range(first_step, steps):
        state.begin(step)
        ...
        state.save(step + 1)
"""

import copy
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from medrl import stopping
from medrl.data.sampler import Sampler
from medrl.errors import CheckpointError, EndpointError, NonFiniteError
from medrl.policy.policy import Policy
from medrl.provenance import code_version, describe_versions
from medrl.runs import Run
from medrl.training import distributed
from medrl.training.checkpoint import (
    checkpoint_name,
    latest_checkpoint,
    load_state,
    remove_leftovers,
    save_checkpoint,
)
from medrl.training.determinism import random_state, seed_everything, set_random_state
from medrl.training.manifest import json_sha256, read_manifest
from medrl.training.methods import Method
from medrl.training.optim import AdamW
from medrl.training.settings import Training

log = logging.getLogger(__name__)
METHOD, RANDOM = "method.", "random."
"""Prefixes of a method's own tensors, and of the generators' state, in a checkpoint; the rest are the optimizer's."""
SLOW_DISK = 100e6
"""Bytes per second: how long a save will take is guessed from it until one was measured."""


class RunState:
    """A run between two steps."""

    def __init__(
        self,
        run: Run,
        policy: Policy,
        optimizer: AdamW,
        sampler: Sampler,
        method: Method,
        settings: Training,
        deadline: stopping.Deadline | None = None,
    ) -> None:
        self.run, self.policy, self.optimizer = run, policy, optimizer
        self.sampler, self.method, self.settings = sampler, method, settings
        self.step = 0
        """Steps that are done, all of them in the weights."""
        self.deadline = deadline
        if deadline is not None:
            deadline.save_s = (self._model_bytes() + optimizer.bytes_saved()) / SLOW_DISK
        self._started = time.monotonic()
        self.skips = 0
        """Steps that were left out."""
        self._seconds_before = 0.0
        self._begun: tuple[int, dict[str, Any], dict[str, Tensor]] | None = None

    @property
    def seconds(self) -> float:
        """Spent on this run, by the processes that were killed too as far as they got saved."""
        return self._seconds_before + time.monotonic() - self._started

    def begin(self, step: int) -> None:
        """Remember what moves in a step before the weights do."""
        self.step = step
        self._begun = self.sampler.position, copy.deepcopy(self.method.state()[1]), random_state()

    def save(self, step: int) -> Path:
        """Write the whole run as it stands after ``step`` steps. All ranks take part, rank 0 writes."""
        started = time.monotonic()
        distributed.check_same("weights", self.policy.fingerprint)
        tensors, optimizer_steps = self.optimizer.state_dict()
        method_tensors, method_state = self.method.state()
        tensors |= {METHOD + name: tensor for name, tensor in method_tensors.items()}
        tensors |= {RANDOM + name: tensor for name, tensor in random_state().items()}
        state = {
            "method": method_state,
            "step": step,
            "sampler_position": self.sampler.position,
            "optimizer_steps": optimizer_steps,
            "log_offsets": self.run.offsets(),
            "seconds": self.seconds,
            "skips": self.skips,
        }

        def write() -> str:
            folder = save_checkpoint(
                self.run.checkpoints, step, self.policy.save, tensors, state, self._manifest(),
                keep=self.settings.keep_checkpoints, model_bytes=self._model_bytes(),
            )  # fmt: skip
            return str(folder)

        folder = Path(distributed.from_first(write))
        if self.deadline is not None:
            self.deadline.saved(time.monotonic() - started)
        return folder

    def restore(self) -> int:
        """Continue from the newest checkpoint that verifies; without one, from the start. Returns the next step.

        Raises ``CheckpointError`` when the checkpoint is one of another run.
        """
        newest = distributed.from_first(self._newest)
        if newest is None:
            seed_everything(self.settings.seed)
            self.run.truncate(dict.fromkeys(self.run.offsets(), 0))
            return 0
        checkpoint = Path(newest)
        self._check_is_ours(checkpoint)
        tensors, state = load_state(checkpoint)
        self.policy.restore(checkpoint)
        self.method.restore(_take(tensors, METHOD), state.get("method", {}))
        dice = _take(tensors, RANDOM)
        self.optimizer.load_state_dict(tensors, state["optimizer_steps"])
        self.sampler.position = state["sampler_position"]
        self.run.truncate(state["log_offsets"])
        if dice:  # early checkpoints have none
            set_random_state(dice)
        self._seconds_before, self.step = state["seconds"], state["step"]
        self.skips = state.get("skips", 0)
        return self.step

    @contextmanager
    def saved_when_stopped(self) -> Iterator[None]:
        """Within, a stop saves the state in which the step under way began, and then goes on.

        So does a server that is gone, which the run may have to wait for longer than its place on the machine lasts.
        """
        try:
            yield
        except (stopping.Stopped, EndpointError):
            # No weight has moved since this step began, so that is the state to save: it is taken again on resume.
            self._take_back()
            if not distributed.from_first((self.run.checkpoints / checkpoint_name(self.step)).exists):
                self.save(self.step)
            raise

    def leave_out(self, error: NonFiniteError) -> dict[str, int]:
        """Go on without the step under way, where the recipe says so; returns what the metrics say of it.

        Nothing of it stays but a line in quarantine.jsonl, and that its examples have had their turn. Raises ``error``
        where the recipe does not say so, or has said so too often.
        """
        if self.settings.on_nonfinite == "stop":
            raise error
        if self.skips >= self.settings.max_skips:
            raise NonFiniteError(
                f"{error}. {self.skips} steps were left out before it, as many as training.max_skips allows"
            ) from error
        position = self.sampler.position
        self._take_back()
        self.sampler.position = position
        self.skips += 1
        self.run.append_quarantine({"step": self.step, "reason": str(error)})
        log.warning("step %d is left out (%d of %d): %s", self.step, self.skips, self.settings.max_skips, error)
        return {"skipped_steps": self.skips}

    def _take_back(self) -> None:
        """Undo what moved in a step that was stopped before the weights did; the method's tensors move only after."""
        if self._begun is not None:
            position, remembered, dice = self._begun
            self.sampler.position = position
            self.method.restore(self.method.state()[0], remembered)
            set_random_state(dice)

    def _newest(self) -> str | None:
        remove_leftovers(self.run.checkpoints)  # a run that was killed after its last step saves no more
        checkpoint = latest_checkpoint(self.run.checkpoints)
        return None if checkpoint is None else str(checkpoint)

    def _manifest(self) -> dict[str, Any]:
        return {
            "recipe_sha256": json_sha256(self.run.recipe),
            "data_fingerprint": self.run.provenance.get("data_fingerprint"),
            "code": code_version(),
            "world_size": distributed.world_size(),
            **describe_versions(),
        }

    def _check_is_ours(self, checkpoint: Path) -> None:
        manifest = read_manifest(checkpoint)
        ours = self._manifest()
        for name in ("recipe_sha256", "data_fingerprint"):
            value = ours[name]
            if manifest.get(name, value) != value:  # early checkpoints do not say
                raise CheckpointError(
                    f"checkpoint {checkpoint} is of another run: its {name} is {manifest[name]}, this run's {value}; "
                    "move it out of the folder, or resume the run it belongs to"
                )

    def _model_bytes(self) -> int:
        return sum(parameter.nbytes for parameter in self.policy.model.parameters())


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Remove the tensors with this prefix, and return them without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
