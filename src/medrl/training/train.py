"""The loop: examples -> groups -> advantages -> update -> record -> checkpoint, for reinforcement and imitation
alike."""

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from medrl import stopping
from medrl.data.prompts import make_prompt
from medrl.data.sampler import Sampler
from medrl.errors import NonFiniteError
from medrl.policy.lengths import check_room
from medrl.policy.policy import Policy
from medrl.progress import Progress
from medrl.provenance import describe_machine, describe_versions
from medrl.rewards import guarded
from medrl.rollout.served import Rollouts
from medrl.runs import Run
from medrl.settings import Settings, choose_settings
from medrl.training import distributed
from medrl.training.ahead import Ahead, make_foresight
from medrl.training.batches import Objective
from medrl.training.budget import Budget
from medrl.training.determinism import deterministic_kernels
from medrl.training.distributed import Scale
from medrl.training.learner import make_learner
from medrl.training.methods import make_method
from medrl.training.metrics import Clock, rollout_rows, step_metrics
from medrl.training.optim import learning_rate
from medrl.training.serving import hand_over, make_server
from medrl.training.settings import Training
from medrl.training.start import Resume, check_hours, check_inputs, choose_curriculum, describe, fingerprint, open_run
from medrl.training.state import RunState
from medrl.training.trackers import Tracker, check_installed, tracking
from medrl.training.update import update_policy
from medrl.types import Example, Groups, Reward


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
        root: folder that image paths in rollouts.jsonl are relative to (the store).
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
    scale = scale or Scale()
    check_hours(max_hours)
    deadline = None if max_hours is None else stopping.Deadline(max_hours * 3600)
    if policy.trained:
        policy.freeze_reference()  # a second training starts where the first one ended
    weights = getattr(reward, "weights", None)  # a reward that is a plain function cannot say what it is
    reward = guarded(reward)
    check_inputs(train_set, reward, settings, objective)
    check_installed(trackers)
    ask = functools.partial(make_prompt, mode=settings.mode, template=settings.template)
    check_room(policy, [ask(example) for example in train_set], settings.sampling.max_new_tokens)
    server = make_server(rollout, settings.sampling, Path(out))
    method = make_method(
        policy, objective, ask, reward, settings.sampling, settings.seed, settings.prompts_per_step, server
    )
    kept, complete = describe(recipe, settings, objective, weights)
    chosen = {"attention": policy.attention, "compiled": policy.compiled}
    provenance = {"data_fingerprint": fingerprint(train_set), **chosen, **(provenance or {})}
    facts = {**describe_versions(), **describe_machine(), **provenance, "world_size": distributed.world_size()}
    quiet = quiet or not distributed.first()

    with ExitStack() as held, deterministic_kernels(settings.deterministic):
        run = distributed.open_together(
            lambda: open_run(
                Path(out), kept, {**facts, "model_fingerprint": policy.fingerprint()}, resume, complete, held=held
            )
        )
        with stopping.at_safe_points(deadline):
            train_set, ranks = choose_curriculum(run, policy, train_set, ask, reward, settings, server, quiet=quiet)
        sampler = Sampler(len(train_set), settings.seed, ranks=ranks)
        coming = make_foresight(train_set, sampler, ask, settings.prompts_per_step)
        budget = Budget(policy, settings.tokens_per_micro_batch)
        learner, optimizer = make_learner(policy, method.policy, settings, scale)
        state = RunState(run, policy, optimizer, sampler, method, settings, deadline)
        first_step = state.restore()
        distributed.check_same("weights", policy.fingerprint)
        policy.trained = True
        with (
            Progress(settings.steps, first_step, quiet=quiet) as progress,
            state.saved_when_stopped(),
            stopping.at_safe_points(deadline),
            Ahead(method.policy, settings.data_workers) as ahead,
            tracking(trackers if distributed.first() else (), run, first_step) as track,
        ):
            ahead.start(coming(0))
            for step in range(first_step, settings.steps):
                clock = Clock()
                state.begin(step)
                distributed.gather(ahead.wait)  # an image that one rank cannot read stops all
                if step + 1 < settings.steps:
                    ahead.start(coming(1))
                clock.lap("data")
                if server is not None:
                    hand_over(server, policy, step)
                    clock.lap("handover")
                groups, row, rollouts = Groups(()), {"step": step}, []
                try:
                    groups = method.collect(lambda count: [train_set[index] for index in sampler.next(count)], step)
                    clock.lap("rollout")
                    advantages = method.advantages(groups)
                    update = update_policy(
                        learner,
                        method.pack(groups, advantages),
                        optimizer,
                        objective,
                        lr=learning_rate(settings.optim, step, settings.steps),
                        temperature=method.temperature,
                        tokens_per_micro_batch=budget,
                        max_tokens=settings.sampling.max_new_tokens,
                    )
                    row |= step_metrics(groups, update)
                    rollouts = rollout_rows(step, groups, advantages.tolist(), update, root)
                except NonFiniteError as error:
                    row |= state.leave_out(error)
                method.finish(step)
                clock.lap("update")
                row |= clock.times(groups)
                run.append_metrics({**row, "eta_s": progress.advance(row)})
                track(step, row)
                run.append_rollouts(rollouts)
                if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                    state.save(step + 1)
        run.update_provenance(seconds=state.seconds)
    return run
