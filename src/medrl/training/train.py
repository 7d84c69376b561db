"""The loop: examples -> groups -> advantages -> update -> record -> checkpoint, for reinforcement and imitation
alike."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from medrl import stopping
from medrl.errors import NonFiniteError
from medrl.policy.policy import Policy
from medrl.rollout.served import Rollouts
from medrl.runs import Run
from medrl.settings import Settings, choose_settings
from medrl.training import distributed
from medrl.training.batches import Objective
from medrl.training.distributed import Scale
from medrl.training.job import at_work, make_job
from medrl.training.optim import learning_rate
from medrl.training.settings import Training
from medrl.training.start import Resume, check_hours
from medrl.training.trackers import Tracker, check_installed
from medrl.training.update import update_policy
from medrl.types import Example, Reward


def train(
    policy: Policy,
    train_set: Sequence[Example],
    reward: Reward,
    objective: Objective,
    *,
    out: str | Path,
    settings: Training | None = None,
    recipe: Settings | None = None,
    provenance: Mapping[str, Any] | None = None,
    root: Path | None = None,
    resume: Resume = "never",
    max_hours: float | None = None,
    quiet: bool = False,
    rollout: Rollouts | None = None,
    scale: Scale | None = None,
    trackers: Sequence[Tracker] = (),
    **options: Any,
) -> Run:
    """Train ``policy`` in place and write everything about it into the run folder ``out``.

    Args:
        train_set: examples to draw from.
        reward: scores completions; ignored by supervised training.
        objective: ``GRPO(...)``, ``SFT(...)`` or ``RFT(...)``.
        settings: see ``Training``; or give its fields as keyword arguments.
        recipe: what the run folder keeps as its recipe; None keeps the settings.
        provenance: facts to keep beside it, e.g. the data's fingerprint.
        root: folder that image paths in rollouts.jsonl are relative to; None takes the store that the images lie in.
        resume: ``never`` refuses a folder that holds a run, ``auto`` continues one, ``must`` demands one.
        max_hours: stop in time for the run to be saved within so many hours from now.
        rollout: the server that writes the completions, if it is not this process.
        scale: how the run is spread over processes that were started together; see ``distributed.joined``.
        trackers: where else the numbers of metrics.jsonl go; see ``trackers``.

    The global generators of Python, NumPy and torch are set from ``settings.seed``.

    Raises:
        RewardError: a right answer would not earn the full reward.
        NonFiniteError: a loss, gradient or reward is not finite, and ``on_nonfinite`` does not say to leave that step
            out; the last checkpoint is as it was.
        EndpointError: the server fails for good, or did not take the weights; the run was saved as it stood.
        RunError, SettingsError, DataError: what was asked makes no sense; nothing was written.
        Stopped: a signal came, or the time is nearly up; the run was saved as it stood before the step under way.
    """
    settings = choose_settings(Training, settings, options)
    check_hours(max_hours)
    deadline = None if max_hours is None else stopping.Deadline(max_hours * 3600)
    check_installed(trackers)
    job = make_job(
        policy, train_set, reward, objective, settings,
        out=Path(out), root=root, recipe=recipe, provenance=provenance, rollout=rollout,
    )  # fmt: skip
    method, quiet = job.method, quiet or not distributed.first()

    with at_work(job, resume=resume, deadline=deadline, scale=scale or Scale(), trackers=trackers, quiet=quiet) as work:
        for step in range(work.first_step, settings.steps):
            entry = work.begin(step)
            try:
                groups = entry.collected(method.collect(work.draw, step))
                advantages = method.advantages(groups)
                update = update_policy(
                    work.learner,
                    method.pack(groups, advantages),
                    work.optimizer,
                    objective,
                    lr=learning_rate(settings.optim, step, settings.steps),
                    temperature=method.temperature,
                    tokens_per_micro_batch=work.budget,
                    max_tokens=settings.sampling.max_new_tokens,
                )
                entry.learned(advantages, update)
            except NonFiniteError as error:
                entry.left_out(work.state.leave_out(error))
            method.finish(step)
            work.record(entry)
            if work.due(step):
                work.state.save(step + 1)
    return work.run
