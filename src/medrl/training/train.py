"""The loop: examples -> groups -> advantages -> update -> record -> checkpoint, for GRPO and supervised training."""

import functools
import hashlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from medrl.data.prompts import find_template, make_prompt
from medrl.data.sampler import Sampler
from medrl.errors import DataError, RewardError, RunError, SettingsError
from medrl.policy.policy import Policy
from medrl.progress import Progress
from medrl.provenance import describe_machine, describe_versions
from medrl.rewards import check_gold
from medrl.rollout.sampling import Sampling
from medrl.runs import Run, is_run
from medrl.settings import Settings, choose_settings, dump_settings
from medrl.training.ahead import Ahead
from medrl.training.batches import Objective, pack_groups
from medrl.training.budget import Budget
from medrl.training.checkpoint import latest_checkpoint, load_state, save_checkpoint
from medrl.training.methods import make_method
from medrl.training.metrics import rollout_rows, step_metrics
from medrl.training.optim import AdamW, Optim, learning_rate
from medrl.training.update import update_policy
from medrl.types import Example, Groups, Mode, Prompt, Reward

Resume = Literal["auto", "never", "must"]


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
    **options: Any,
) -> Run:
    """Train ``policy`` in place and write everything about it into the run folder ``out``.

    Args:
        train_set: examples to draw from.
        reward: scores completions; ignored by supervised training.
        objective: ``GRPO(...)`` or ``SFT(...)``.
        settings: see ``Training``; or give its fields as keyword arguments.
        recipe: what the run folder keeps as its recipe; None keeps the settings.
        provenance: facts to keep beside it, e.g. the data's fingerprint.
        root: folder that image paths in rollouts.jsonl are relative to (the store).
        resume: ``never`` refuses a folder that holds a run, ``auto`` continues one, ``must`` demands one.

    Raises:
        RewardError: a right answer would not earn the full reward.
        NonFiniteError: a loss, gradient or reward is not finite; the last checkpoint is as it was.
        RunError, SettingsError, DataError: what was asked makes no sense; nothing was written.
    """
    settings = choose_settings(Training, settings, options)
    if policy.trained:
        policy.freeze_reference()  # a second training starts where the first one ended
    check_inputs(train_set, reward, settings)
    ask = functools.partial(make_prompt, mode=settings.mode, template=settings.template)
    check_room(policy, [ask(example) for example in train_set], settings.sampling.max_new_tokens)
    method = make_method(policy, objective, ask, reward, settings.sampling, settings.seed)
    weights = getattr(reward, "weights", None)  # a reward that is a plain function cannot say what it is
    described = {"objective": dump_settings(objective)} | ({"reward": dict(weights)} if weights else {})
    recipe = dict(recipe or {**described, **dump_settings(settings)})
    provenance = {"data_fingerprint": fingerprint(train_set), "attention": policy.attention, **(provenance or {})}
    run = open_run(Path(out), recipe, {**describe_versions(), **describe_machine(), **provenance}, resume)

    sampler = Sampler(len(train_set), settings.seed)
    budget = Budget(policy, settings.tokens_per_micro_batch)
    optimizer = AdamW(policy.model.named_parameters(), settings.optim)
    first_step, seconds_before = restore(run, policy, optimizer, sampler)
    policy.trained = True
    started = time.monotonic()
    # A second sampler runs one step before the first: what is saved is what was trained on.
    coming = Sampler(len(train_set), settings.seed, sampler.position)
    with Progress(settings.steps, first_step, quiet=quiet) as progress, Ahead(policy) as ahead:
        for step in range(first_step, settings.steps):
            clock = Clock()
            if step == first_step:
                ahead.start([ask(train_set[index]) for index in coming.next(settings.prompts_per_step)])
            ahead.wait()
            if step + 1 < settings.steps:
                ahead.start([ask(train_set[index]) for index in coming.next(settings.prompts_per_step)])
            clock.lap("data")
            examples = [train_set[index] for index in sampler.next(settings.prompts_per_step)]
            groups = method.collect(examples, step)
            clock.lap("rollout")
            advantages = method.advantages(groups)
            batch = pack_groups(groups, advantages)
            update = update_policy(
                policy,
                batch,
                optimizer,
                objective,
                lr=learning_rate(settings.optim, step, settings.steps),
                temperature=method.temperature,
                tokens_per_micro_batch=budget,
            )
            clock.lap("update")
            row = {"step": step, **step_metrics(groups, update), **clock.times(groups)}
            run.append_metrics({**row, "eta_s": progress.advance(row)})
            run.append_rollouts(rollout_rows(step, groups, advantages.tolist(), root))
            if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
                seconds = seconds_before + time.monotonic() - started
                save(run, step + 1, policy, optimizer, sampler, settings, seconds)
    run.update_provenance(seconds=seconds_before + time.monotonic() - started)
    return run


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over the examples, image files by name: what a resumed run compares when no store tells."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(replace(example, images=tuple(Path(image.name) for image in example.images))).encode())
    return digest.hexdigest()


def check_inputs(train_set: Sequence[Example], reward: Reward, settings: Training) -> None:
    """Refuse what cannot be trained on, before anything is written."""
    if not train_set:
        raise DataError("the training set is empty: check data.train and its filters")
    find_template(settings.mode, settings.template)
    rejected = check_gold(reward, train_set, settings.mode)
    if rejected:
        shown = "; ".join(f"{example.id}: {score.explanation}" for example, score in rejected[:5])
        raise RewardError(
            f"the reward does not give full marks to the right answer of {len(rejected)} of {len(train_set)} examples, "
            f"so it cannot teach them ({shown}): correct those rows or the reward"
        )


def check_room(policy: Policy, prompts: Sequence[Prompt], room_tokens: int, tried: int = 8) -> None:
    """Encode the prompts with the longest texts, so that most of what cannot fit is known before a folder is made."""
    longest = sorted(prompts, key=lambda prompt: (len(prompt.images), len(prompt.text)), reverse=True)[:tried]
    policy.encode(longest, room_tokens=room_tokens)


def open_run(out: Path, recipe: Mapping[str, Any], provenance: Mapping[str, Any], resume: Resume) -> Run:
    """Create the run folder, or open the one there is when ``resume`` allows it."""
    if resume == "must" and not is_run(out):
        raise RunError(f"--resume must: {out} holds no run; start one with --resume never, or give the right --out")
    if resume == "never" or not is_run(out):
        return Run.create(out, recipe, provenance)
    run = Run.open(out)
    differing = sorted(key for key in {*run.recipe, *recipe} if run.recipe.get(key) != recipe.get(key))
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
    run: Run, step: int, policy: Policy, optimizer: AdamW, sampler: Sampler, settings: Training, seconds: float
) -> Path:
    """Write the whole run as it stands after ``step`` steps."""
    tensors, optimizer_steps = optimizer.state_dict()
    state = {
        "step": step,
        "sampler_position": sampler.position,
        "optimizer_steps": optimizer_steps,
        "log_offsets": run.offsets(),
        "seconds": seconds,
    }
    manifest = {"data": run.provenance.get("data_fingerprint"), **describe_versions()}
    return save_checkpoint(run.checkpoints, step, policy.save, tensors, state, manifest, keep=settings.keep_checkpoints)


def restore(run: Run, policy: Policy, optimizer: AdamW, sampler: Sampler) -> tuple[int, float]:
    """Continue from the newest checkpoint that verifies. Returns the next step and the seconds spent before it.

    All randomness is a function of seed and step, so there is no generator to restore.
    """
    checkpoint = latest_checkpoint(run.checkpoints)
    if checkpoint is None:
        run.truncate(dict.fromkeys(run.offsets(), 0))
        return 0, 0.0
    tensors, state = load_state(checkpoint)
    policy.restore(checkpoint)
    optimizer.load_state_dict(tensors, state["optimizer_steps"])
    sampler.position = state["sampler_position"]
    run.truncate(state["log_offsets"])
    return state["step"], state["seconds"]


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
