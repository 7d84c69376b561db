"""A step's numbers under the names of docs/records.md, which are TRL's where TRL has one."""

import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from torch import Tensor

from medrl.training.monitors import implied, is_right, step_monitors, tags_off
from medrl.training.totals import Update
from medrl.types import Group, Groups, relative_to


def step_metrics(groups: Groups, update: Update) -> dict[str, Any]:
    """One row of metrics.jsonl, without the times. Reward figures are there only where completions were sampled.

    They are of the task's reward: what an algorithm adds to it (overlong, KL) stands among the parts. A part's mean is
    over the completions that have it: rewards by source have different parts.
    """
    return {**_rewards(groups), **_update(update), **_kl_of_rewards(groups), **_lengths(groups)}


def _rewards(groups: Groups) -> dict[str, float]:
    if not groups.sampled:
        return {}
    scores = [rollout.score for rollout in groups.rollouts]
    parts: dict[str, list[float]] = {}
    for score in scores:
        for part, value in score.parts.items():
            parts.setdefault(part, []).append(value)
    kept, dropped = _task_rewards(groups.items), _task_rewards(groups.dropped)
    spreads = [stdev(rewards) for rewards in kept if len(rewards) > 1]
    return {
        "reward": fmean(score.value for score in scores),
        "reward_std": fmean(spreads) if spreads else 0.0,
        "frac_reward_zero_std": fmean(len(set(rewards)) == 1 for rewards in [*kept, *dropped]),
        **({"dropped_groups": len(groups.dropped)} if groups.dropped else {}),
        **{f"rewards/{part}/mean": fmean(values) for part, values in parts.items()},
        "parse_fail_rate": fmean(score.answer is None for score in scores),
        **step_monitors(groups),
    }


def _task_rewards(groups: Iterable[Group]) -> list[list[float]]:
    """(N, G) rewards before shaping: a KL or a length differs between completions that are equally good."""
    return [[rollout.score.value for rollout in group.rollouts] for group in groups]


def _update(update: Update) -> dict[str, float]:
    row = {
        "loss": update.loss,
        "policy_loss": update.policy_loss,
        "kl": update.kl,
        "clip_fraction": update.clip_fraction,
        "entropy": update.entropy,
        "grad_norm": update.grad_norm,
        "lr": update.lr,
        "skipped_groups": update.skipped_groups,
        "training_tokens": update.tokens,
    }
    for name in ("sampling_gap", "sampling_weight", "sampling_capped"):
        value = getattr(update, name)
        if value is not None:
            row[name] = value
    return row


def _kl_of_rewards(groups: Groups) -> dict[str, float]:
    """Mean KL per token where it is a part of the reward and not of the loss."""
    charged = [rollout for rollout in groups.rollouts if "kl" in rollout.score.parts]
    tokens = sum(len(rollout.completion.token_ids) for rollout in charged)
    return {"kl": sum(rollout.score.parts["kl"] for rollout in charged) / tokens} if tokens else {}


def _lengths(groups: Groups) -> dict[str, float]:
    completions = [rollout.completion for rollout in groups.rollouts]
    ended = [len(c.token_ids) for c in completions if not c.truncated]
    lengths = [len(c.token_ids) for c in completions]
    return {
        "completions/mean_length": fmean(lengths),
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/mean_terminated_length": fmean(ended) if ended else 0.0,
        "completions/clipped_ratio": fmean(c.truncated for c in completions),
    }


def rollout_rows(
    step: int,
    groups: Groups,
    advantages: Iterable[Iterable[float]],
    update: Update | None = None,
    root: Path | None = None,
) -> list[dict[str, Any]]:
    """Rows of rollouts.jsonl: every completion with its reward, parts, advantage and what the monitors see in it.

    Images are relative to ``root``. Entropy, KL and the sampler's gap are those of the training pass, and absent where
    there was none.
    """
    measured = _measured(groups, update)
    return [
        {
            "step": step,
            "prompt_id": group.prompt.id,
            "images": [relative_to(image, root) for image in group.prompt.images],
            "completion": rollout.completion.text,
            "finish_reason": rollout.completion.finish_reason,
            "reward": rollout.reward,
            "parts": rollout.score.parts,
            "answer": rollout.score.answer,
            "target": group.example.target,
            "right": is_right(group.example, rollout),
            "advantage": advantage,
            "tokens": len(rollout.completion.token_ids),
            "implied": implied(group.example, rollout.completion),
            "tags_off": tags_off(rollout.completion),
            **seen,
        }
        for group, values, rows in zip(groups, advantages, measured, strict=True)
        for rollout, advantage, seen in zip(group.rollouts, values, rows, strict=True)
    ]


def _measured(groups: Groups, update: Update | None) -> list[list[dict[str, float]]]:
    """Per group and completion, the figures of the training pass that there are."""
    nothing: list[list[dict[str, float]]] = [[{} for _ in group.rollouts] for group in groups]
    if update is None or len(update.completions) != len(groups):  # what was trained on is not what was sampled
        return nothing
    return [
        [{name: value for name, value in asdict(one).items() if value is not None} for one in rows]
        if rows is not None and len(rows) == len(empty)
        else empty
        for rows, empty in zip(update.completions, nothing, strict=True)
    ]


class Entry:
    """What one step leaves in metrics.jsonl and rollouts.jsonl, written while it goes on.

    A step that is left out has times and what ``left_out`` says, and no rollouts.
    """

    def __init__(self, step: int, root: Path | None = None) -> None:
        self.step, self.root = step, root
        self.rollouts: list[dict[str, Any]] = []
        self._groups = Groups(())
        self._numbers: dict[str, Any] = {}
        self._start = self._last = time.monotonic()
        self._phases: dict[str, float] = {}

    def lap(self, phase: str) -> None:
        """What has gone on since the last lap was ``phase``."""
        now = time.monotonic()
        self._phases[phase] = now - self._last
        self._last = now

    def collected(self, groups: Groups) -> Groups:
        """These were sampled, from the last lap to now."""
        self._groups = groups
        self.lap("rollout")
        return groups

    def learned(self, advantages: Tensor, update: Update) -> None:
        """The policy has moved by ``update``, which weighed what was collected by ``advantages``, (N, G)."""
        self._numbers = step_metrics(self._groups, update)
        self.rollouts = rollout_rows(self.step, self._groups, advantages.tolist(), update, self.root)

    def left_out(self, numbers: dict[str, int]) -> None:
        """The policy has not moved; ``numbers`` are what there is to say of that."""
        self._numbers = numbers

    def row(self) -> dict[str, Any]:
        """The line of metrics.jsonl: the numbers, seconds of each phase, completion tokens per second of the step."""
        total = self._last - self._start
        tokens = sum(len(rollout.completion.token_ids) for rollout in self._groups.rollouts)
        return {
            "step": self.step,
            **self._numbers,
            **{f"time/{phase}_s": seconds for phase, seconds in self._phases.items()},
            "time/step_s": total,
            "tokens_per_s": tokens / total,
        }
