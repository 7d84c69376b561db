"""What happens before the first step: refuse what cannot be trained on, open the run folder, choose the questions."""

import hashlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from medrl.data.prompts import find_template
from medrl.errors import DataError, RewardError, RunError, SettingsError
from medrl.files import remove_torn
from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.rewards import check_gold, check_wrong
from medrl.rollout.collect import Ask
from medrl.rollout.served import Server
from medrl.runs import Run, check_vacant, is_blank, is_run, locked
from medrl.settings import Settings, dump_settings, with_defaults
from medrl.training.batches import Objective
from medrl.training.curriculum import arrange, pass_rates
from medrl.training.methods import check_demonstrations
from medrl.training.serving import hand_over
from medrl.training.settings import Training
from medrl.types import Example, Reward

Resume = Literal["auto", "never", "must"]
Complete = Callable[[Mapping[str, Any]], dict[str, Any]]
"""Fills up a recipe that an older version wrote."""
MAY_CHANGE = (
    "scale",
    "trackers",
    "rollout",
    "data.train",  # what lies there must be the same, by its fingerprint
    "policy.checkpoint_activations",
    "training.data_processes",
    "training.data_workers",
    "training.keep_checkpoints",
    "training.save_every",
    "training.tokens_per_micro_batch",
)
"""Sections and settings of a recipe that say where, how fast and how often saved, not what: a run may be resumed with
others."""
WHY_NOT = {"training.steps": "the learning rate falls over them"}
"""Why a setting that looks harmless may not change."""
MUST_BE_THE_SAME = {
    "data_fingerprint": "the training data are not those that {out} was started with",
    "model_fingerprint": "the model is not the one that {out} was started with (from Python: load it anew)",
}
"""Facts of a run's provenance, and what it means when they differ."""
UNSET = "not set"
GOLD_SHOWN = 20
"""Examples listed when the reward rejects right answers."""
WRONG_ASKED = 100
"""Examples of which a wrong answer is graded too; a warning needs no more."""


def check_hours(max_hours: float | None) -> None:
    """Raise ``SettingsError`` for a time in which nothing can be trained."""
    if max_hours is not None and not max_hours > 0:
        raise SettingsError(f"max_hours is {max_hours:g}, but there must be some time to train in")


def check_inputs(train_set: Sequence[Example], reward: Reward, settings: Training, objective: Objective) -> None:
    """Refuse what cannot be trained on, before anything is written."""
    if not train_set:
        raise DataError("the training set is empty: check data.train and its filters")
    find_template(settings.mode, settings.template)
    check_demonstrations(train_set, settings.mode, objective)
    if settings.on_nonfinite == "skip" and isinstance(objective, GRPO) and objective.updates_per_rollout > 1:
        raise SettingsError(
            "training.on_nonfinite is 'skip', but with grpo.updates_per_rollout above 1 a part of the step would have "
            "been learned: set one of them back"
        )
    rejected = check_gold(reward, train_set, settings.mode)
    if rejected:
        lines = [f"  {example.id}: {score.value:g}. {score.explanation}" for example, score in rejected[:GOLD_SHOWN]]
        more = [f"  and {len(rejected) - GOLD_SHOWN} more"] if len(rejected) > GOLD_SHOWN else []
        raise RewardError(
            "the reward does not give full marks, or gives no more than to an empty completion, for the right answer "
            f"of {len(rejected)} of {len(train_set)} examples, "
            "so it cannot teach them; correct those rows, leave them out, or correct the reward:\n"
            + "\n".join(lines + more)
        )
    asked = train_set[:WRONG_ASKED]
    if same := check_wrong(reward, asked, settings.mode):
        example, score = same[0]
        warnings.warn(
            f"the reward gives a wrong answer as much as the right one for {len(same)} of the first {len(asked)} "
            f"examples ({score.value:g} for {example.id}), so it cannot teach them what is right",
            stacklevel=2,
        )


def describe(
    recipe: Settings | None, settings: Training, objective: Objective, weights: Mapping[str, float] | None
) -> tuple[dict[str, Any], Complete]:
    """The recipe that the run folder keeps, and how one that an older version kept is read today.

    Args:
        recipe: settings of everything, where there are such; None when the run was started from Python.
        weights: what the reward says of itself.
    """
    if recipe is not None:
        return dump_settings(recipe), lambda old: with_defaults(old, recipe)

    def complete(old: Mapping[str, Any]) -> dict[str, Any]:
        return {**with_defaults(old, settings), "objective": with_defaults(old.get("objective", {}), objective)}

    reward = {"reward": dict(weights)} if weights else {}
    return {"objective": dump_settings(objective), **reward, **dump_settings(settings)}, complete


def open_run(
    out: Path,
    recipe: Mapping[str, Any],
    provenance: Mapping[str, Any],
    resume: Resume,
    complete: Complete = dict,
    *,
    held: ExitStack,
) -> Run:
    """Create the run folder, or open the one there is when ``resume`` allows it; its lock is let go with ``held``."""
    if resume == "must" and not is_run(out):
        raise RunError(f"--resume must: {out} holds no run; start one with --resume never, or give the right --out")
    anew = resume == "never" or not is_run(out) or is_blank(out)
    if anew:
        check_vacant(out)  # before anything is put there
    held.enter_context(locked(out))
    remove_torn(out)
    if anew:
        return Run.create(out, recipe, provenance)
    run = Run.open(out)
    before = complete(run.recipe)
    differing = _differing(before, recipe)
    if differing:
        raise SettingsError(
            f"{out} was started with other settings: {'; '.join(differing)}. Resume it with the recipe it was started "
            f"with ({out / 'recipe.yaml'}), or choose another --out"
        )
    _check_reward_files(run, provenance)
    for fact, meaning in MUST_BE_THE_SAME.items():
        if fact in run.provenance and run.provenance[fact] != provenance.get(fact):
            raise RunError(
                f"{meaning.format(out=out)}: their fingerprints differ. Resume it with what it was started with, or "
                "choose another --out"
            )
    return run


def _differing(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Settings that differ and may not, each with both values."""
    was, are = _dotted(before), _dotted(now)
    found = []
    for key in sorted(was.keys() | are.keys()):
        # A run that was started from Python has the settings of training at its top.
        full = f"training.{key}" if f"training.{key}" in (*MAY_CHANGE, *WHY_NOT) else key
        free = any(full == name or full.startswith(f"{name}.") for name in MAY_CHANGE)
        if not free and was.get(key, UNSET) != are.get(key, UNSET):
            why = f" ({WHY_NOT[full]})" if full in WHY_NOT else ""
            found.append(f"{key} was {_word(was.get(key, UNSET))} and is now {_word(are.get(key, UNSET))}{why}")
    return found


def _word(value: Any) -> Any:
    """As a recipe has it."""
    return {True: "true", False: "false", None: "empty"}[value] if value is None or isinstance(value, bool) else value


def _dotted(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        found |= _dotted(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def _check_reward_files(run: Run, provenance: Mapping[str, Any]) -> None:
    """Refuse to go on with a reward function that was edited: the recipe names its file, not what stands there."""
    before, now = (facts.get("reward_files") or {} for facts in (run.provenance, provenance))
    changed = [name for name, digest in now.items() if before.get(name, digest) != digest]
    if changed:
        kept = ", ".join(f"{name}: {before[name][:12]}" for name in changed)
        raise RunError(
            f"{', '.join(changed)} has changed since {run.path} was started, so it would go on with another reward: "
            f"resume it with the file as it was (sha256 of {kept}), or choose another --out"
        )


def fingerprint(examples: Sequence[Example]) -> str:
    """sha256 over the examples, image files by name: what a resumed run compares when no store tells."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr(replace(example, images=tuple(Path(image.name) for image in example.images))).encode())
    return digest.hexdigest()


def choose_curriculum(
    run: Run,
    policy: Policy,
    train_set: Sequence[Example],
    ask: Ask,
    reward: Reward,
    settings: Training,
    server: Server | None = None,
    *,
    quiet: bool,
) -> tuple[Sequence[Example], list[float] | None]:
    """What is asked and in which order; asks the policy, which is untrained as yet, for its pass rates where that
    matters."""
    if settings.curriculum.use == "none":
        return train_set, None
    generator = None
    if server is not None:
        hand_over(server, policy, 0)
        generator = server.generate
    rates = pass_rates(
        run, policy, train_set, ask, reward, settings.sampling, settings.curriculum,
        seed=settings.seed, batch_size=settings.prompts_per_step, generator=generator, quiet=quiet,
    )  # fmt: skip
    kept, ranks = arrange(train_set, rates, settings.curriculum)
    if not quiet:
        order = ", the easy first" if ranks is not None else ""
        print(f"curriculum: {len(kept)} of {len(train_set)} questions kept{order}", file=sys.stderr)  # noqa: T201
    return kept, ranks
