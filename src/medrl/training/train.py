"""The loop: examples -> groups -> advantages -> update -> record -> checkpoint, for reinforcement and imitation
alike."""

import copy
import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medrl import stopping
from medrl.data.prompts import find_template, make_prompt
from medrl.data.sampler import Sampler
from medrl.errors import DataError, RewardError, RunError, SettingsError
from medrl.policy.lengths import check_room
from medrl.policy.policy import Policy
from medrl.progress import Progress
from medrl.provenance import describe_machine, describe_versions
from medrl.rewards import check_gold, guarded
from medrl.rollout.collect import Ask
from medrl.rollout.sampling import Sampling
from medrl.runs import Run, is_run
from medrl.settings import Settings, choose_settings, dump_settings
from medrl.training import distributed
from medrl.training.ahead import Ahead
from medrl.training.batches import Objective
from medrl.training.budget import Budget
from medrl.training.checkpoint import checkpoint_name, latest_checkpoint, load_state, save_checkpoint
from medrl.training.curriculum import Curriculum, arrange, pass_rates
from medrl.training.distributed import Scale
from medrl.training.methods import Method, check_demonstrations, make_method
from medrl.training.metrics import rollout_rows, step_metrics
from medrl.training.optim import AdamW, Optim, learning_rate
from medrl.training.released import ReleasedTurns
from medrl.training.scorer import Scorer
from medrl.training.sharded import Sharded, ShardedAdamW
from medrl.training.trackers import Tracker, check_installed, tracking
from medrl.training.update import update_policy
from medrl.types import Example, Groups, Mode, Prompt, Reward

Resume = Literal["auto", "never", "must"]
GOLD_SHOWN = 20
"""Examples listed when the reward rejects right answers."""
MAY_CHANGE = {"scale", "trackers"}
"""Sections of a recipe that say where and how fast, not what: a run may be resumed with others."""
METHOD = "method."
"""Prefix of a method's own tensors in a checkpoint, beside the optimizer's."""


class Training(Settings):
    """The settings of a run that do not belong to one objective."""

    steps: int = Field(default=500, ge=1)
    """Optimizer steps."""
    prompts_per_step: int = Field(default=4, ge=1)
    """Prompts (groups) per step; the papers: 4."""
    mode: Mode = "think"
    """Form of completion asked for."""
    template: str | None = None
    """Prompt wording by name; None takes the mode's default."""
    sampling: Sampling = Sampling()
    optim: Optim = Optim()
    curriculum: Curriculum = Curriculum()
    tokens_per_micro_batch: int | None = Field(default=None, ge=1)
    """Tokens that go through the model together; patches of a vision tower that learns count as parts of a token. None
    finds it on a GPU, and takes 4096 on a CPU. Changes memory and speed, not the result."""
    save_every: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=2, ge=1)
    seed: int = 42


def train(
    policy: Policy,
    train_set: Sequence[Example],
    reward: Reward,
    objective: Objective,
    *,
    out: str | Path,
    settings: Training | None = None,
    recipe: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
    root: Path | None = None,
    resume: Resume = "never",
    quiet: bool = False,
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
        scale: how the run is spread over processes that were started together; see ``distributed.joined``.
        trackers: where else the numbers of metrics.jsonl go; see ``trackers``.

    Raises:
        RewardError: a right answer would not earn the full reward.
        NonFiniteError: a loss, gradient or reward is not finite; the last checkpoint is as it was.
        RunError, SettingsError, DataError: what was asked makes no sense; nothing was written.
        Stopped: SIGTERM or Ctrl-C came; the run was saved as it stood before the step that was under way.
    """
    settings = choose_settings(Training, settings, options)
    scale = scale or Scale()
    if policy.trained:
        policy.freeze_reference()  # a second training starts where the first one ended
    weights = getattr(reward, "weights", None)  # a reward that is a plain function cannot say what it is
    reward = guarded(reward)
    check_inputs(train_set, reward, settings, objective)
    check_installed(trackers)
    ask = functools.partial(make_prompt, mode=settings.mode, template=settings.template)
    check_room(policy, [ask(example) for example in train_set], settings.sampling.max_new_tokens)
    method = make_method(policy, objective, ask, reward, settings.sampling, settings.seed, settings.prompts_per_step)
    described = {"objective": dump_settings(objective)} | ({"reward": dict(weights)} if weights else {})
    recipe = dict(recipe or {**described, **dump_settings(settings)})
    provenance = {"data_fingerprint": fingerprint(train_set), "attention": policy.attention, **(provenance or {})}
    facts = {**describe_versions(), **describe_machine(), **provenance, "world_size": distributed.world_size()}
    run = distributed.open_together(lambda: open_run(Path(out), recipe, facts, resume))
    quiet = quiet or not distributed.first()

    started = time.monotonic()
    train_set, ranks = choose_curriculum(run, policy, train_set, ask, reward, settings, quiet=quiet)
    sampler = Sampler(len(train_set), settings.seed, ranks=ranks)
    draw = functools.partial(draw_examples, train_set, sampler)
    coming = functools.partial(foresee, train_set, sampler, ask, settings.prompts_per_step)
    budget = Budget(policy, settings.tokens_per_micro_batch)
    learner, optimizer = make_learner(policy, method.policy, settings, scale)
    first_step, seconds_before = restore(run, policy, optimizer, sampler, method)
    distributed.check_same("weights", policy.fingerprint)
    policy.trained = True
    step, before = first_step, remember(sampler, method)
    try:
        with (
            Progress(settings.steps, first_step, quiet=quiet) as progress,
            stopping.at_safe_points(),
            Ahead(method.policy) as ahead,
            tracking(trackers if distributed.first() else (), run, first_step) as track,
        ):
            ahead.start(coming(steps=0))
            for step in range(first_step, settings.steps):
                clock, before = Clock(), remember(sampler, method)
                ahead.wait()
                if step + 1 < settings.steps:
                    ahead.start(coming(steps=1))
                clock.lap("data")
                groups = method.collect(draw, step)
                clock.lap("rollout")
                advantages = method.advantages(groups)
                batch = method.pack(groups, advantages)
                update = update_policy(
                    learner,
                    batch,
                    optimizer,
                    objective,
                    lr=learning_rate(settings.optim, step, settings.steps),
                    temperature=method.temperature,
                    tokens_per_micro_batch=budget,
                    max_tokens=settings.sampling.max_new_tokens,
                )
                method.finish(step)
                clock.lap("update")
                row = {"step": step, **step_metrics(groups, update), **clock.times(groups)}
                run.append_metrics({**row, "eta_s": progress.advance(row)})
                track(step, row)
                run.append_rollouts(rollout_rows(step, groups, advantages.tolist(), update, root))
                if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                    seconds = seconds_before + time.monotonic() - started
                    save(run, step + 1, policy, optimizer, sampler, method, settings, seconds)
    except stopping.Stopped:
        # No weight has moved since this step began, so that is the state to save: the step is taken again on resume.
        recall(before, sampler, method)
        if not (run.checkpoints / checkpoint_name(step)).exists():
            save(run, step, policy, optimizer, sampler, method, settings, seconds_before + time.monotonic() - started)
        raise
    run.update_provenance(seconds=seconds_before + time.monotonic() - started)
    return run


def draw_examples(train_set: Sequence[Example], sampler: Sampler, count: int) -> list[Example]:
    """The next ``count`` examples; none for none."""
    return [train_set[index] for index in sampler.next(count)] if count else []


def foresee(train_set: Sequence[Example], sampler: Sampler, ask: Ask, count: int, *, steps: int) -> list[Prompt]:
    """This rank's share of the ``count`` prompts whose turn comes after those of the next ``steps`` steps.

    Drawing goes on as if unasked.

    Where a step draws more than ``count``, to replace what teaches nothing, these are the first it takes.
    """
    return [ask(train_set[index]) for index in distributed.share(sampler.peek(count, skip=steps * count))]


def remember(sampler: Sampler, method: Method) -> tuple[int, dict[str, Any]]:
    """What moves in a step before the weights do."""
    return sampler.position, copy.deepcopy(method.state()[1])


def recall(before: tuple[int, dict[str, Any]], sampler: Sampler, method: Method) -> None:
    """Take back what moved in a step that was stopped before the weights did; tensors move only after them."""
    sampler.position = before[0]
    method.restore(method.state()[0], before[1])


def choose_curriculum(
    run: Run, policy: Policy, train_set: Sequence[Example], ask: Ask, reward: Reward, settings: Training, *, quiet: bool
) -> tuple[Sequence[Example], list[float] | None]:
    """What is asked and in which order; asks the policy, which is untrained as yet, for its pass rates where that
    matters."""
    if settings.curriculum.use == "none":
        return train_set, None
    rates = pass_rates(
        run, policy, train_set, ask, reward, settings.sampling, settings.curriculum,
        seed=settings.seed, batch_size=settings.prompts_per_step, quiet=quiet,
    )  # fmt: skip
    return arrange(train_set, rates, settings.curriculum)


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over the examples, image files by name: what a resumed run compares when no store tells."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(replace(example, images=tuple(Path(image.name) for image in example.images))).encode())
    return digest.hexdigest()


def check_inputs(train_set: Sequence[Example], reward: Reward, settings: Training, objective: Objective) -> None:
    """Refuse what cannot be trained on, before anything is written."""
    if not train_set:
        raise DataError("the training set is empty: check data.train and its filters")
    find_template(settings.mode, settings.template)
    check_demonstrations(train_set, settings.mode, objective)
    rejected = check_gold(reward, train_set, settings.mode)
    if rejected:
        lines = [f"  {example.id}: {score.value:g}. {score.explanation}" for example, score in rejected[:GOLD_SHOWN]]
        more = [f"  and {len(rejected) - GOLD_SHOWN} more"] if len(rejected) > GOLD_SHOWN else []
        raise RewardError(
            f"the reward does not give full marks to the right answer of {len(rejected)} of {len(train_set)} examples, "
            "so it cannot teach them; correct those rows, leave them out, or correct the reward:\n"
            + "\n".join(lines + more)
        )


def open_run(out: Path, recipe: Mapping[str, Any], provenance: Mapping[str, Any], resume: Resume) -> Run:
    """Create the run folder, or open the one there is when ``resume`` allows it."""
    if resume == "must" and not is_run(out):
        raise RunError(f"--resume must: {out} holds no run; start one with --resume never, or give the right --out")
    if resume == "never" or not is_run(out):
        return Run.create(out, recipe, provenance)
    run = Run.open(out)
    names = {*run.recipe, *recipe} - MAY_CHANGE
    differing = sorted(key for key in names if run.recipe.get(key) != recipe.get(key))
    if differing:
        raise SettingsError(
            f"{out} was started with other settings of {', '.join(differing)}: resume it with the recipe it was "
            f"started with ({out / 'recipe.yaml'}), or choose another --out"
        )
    if run.provenance.get("data_fingerprint") != provenance.get("data_fingerprint"):
        raise RunError(
            f"the training data are not those that {out} was started with (their fingerprint differs): resume it with "
            "those, or choose another --out"
        )
    return run


def save(
    run: Run,
    step: int,
    policy: Policy,
    optimizer: AdamW,
    sampler: Sampler,
    method: Method,
    settings: Training,
    seconds: float,
) -> Path:
    """Write the whole run as it stands after ``step`` steps. All ranks take part, rank 0 writes."""
    distributed.check_same("weights", policy.fingerprint)
    tensors, optimizer_steps = optimizer.state_dict()
    method_tensors, method_state = method.state()
    tensors |= {METHOD + name: tensor for name, tensor in method_tensors.items()}
    state = {
        "method": method_state,
        "step": step,
        "sampler_position": sampler.position,
        "optimizer_steps": optimizer_steps,
        "log_offsets": run.offsets(),
        "seconds": seconds,
    }
    manifest = {
        "data": run.provenance.get("data_fingerprint"),
        "world_size": distributed.world_size(),
        **describe_versions(),
    }
    keep, written = settings.keep_checkpoints, functools.partial(save_checkpoint, run.checkpoints, step, policy.save)
    return Path(distributed.from_first(lambda: str(written(tensors, state, manifest, keep=keep))))


def restore(run: Run, policy: Policy, optimizer: AdamW, sampler: Sampler, method: Method) -> tuple[int, float]:
    """Continue from the newest checkpoint that verifies. Returns the next step and the seconds spent before it.

    All randomness is a function of seed and step, so there is no generator to restore; what a method remembers (a
    reference that moves, how its domains fared) is restored with it.
    """
    checkpoint = distributed.from_first(lambda: as_text(latest_checkpoint(run.checkpoints)))
    if checkpoint is None:
        run.truncate(dict.fromkeys(run.offsets(), 0))
        return 0, 0.0
    tensors, state = load_state(Path(checkpoint))
    policy.restore(Path(checkpoint))
    remembered = {name.removeprefix(METHOD): tensors.pop(name) for name in list(tensors) if name.startswith(METHOD)}
    method.restore(remembered, state.get("method", {}))
    optimizer.load_state_dict(tensors, state["optimizer_steps"])
    sampler.position = state["sampler_position"]
    run.truncate(state["log_offsets"])
    return state["step"], state["seconds"]


def as_text(path: Path | None) -> str | None:
    """A path as ranks tell each other."""
    return None if path is None else str(path)


def make_learner(
    policy: Policy, scorer: Policy | ReleasedTurns, settings: Training, scale: Scale
) -> tuple[Scorer, AdamW]:
    """What an update takes as the policy, and the optimizer of its weights."""
    if scale.offload_reference:
        policy.offload_reference()
    if scale.strategy == "fsdp" and distributed.world_size() > 1:
        if isinstance(scorer, ReleasedTurns):
            raise SettingsError("sft.emulate cannot be used with scale.strategy fsdp: set it to ddp")
        if settings.tokens_per_micro_batch is None and policy.device.type == "cuda":
            raise SettingsError(
                "scale.strategy fsdp needs training.tokens_per_micro_batch: all ranks pass together, so none can try "
                "alone what fits; 'medrl plan' proposes a number"
            )
        learner = Sharded(policy)
        return learner, ShardedAdamW(learner, settings.optim)
    return scorer, AdamW(policy.model.named_parameters(), settings.optim)


class Clock:
    """Seconds of each phase of a step."""

    def __init__(self) -> None:
        self.start = self.last = time.monotonic()
        self.phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        now = time.monotonic()
        self.phases[phase] = now - self.last
        self.last = now

    def times(self, groups: Groups) -> dict[str, float]:
        """Seconds of each phase, and completion tokens per second of the whole step."""
        total = self.last - self.start
        tokens = sum(len(rollout.completion.token_ids) for rollout in groups.rollouts)
        return {
            **{f"time/{phase}_s": seconds for phase, seconds in self.phases.items()},
            "time/step_s": total,
            "tokens_per_s": tokens / total,
        }
