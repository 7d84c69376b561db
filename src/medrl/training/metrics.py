"""A step's numbers under the names of docs/records.md, which are TRL's where TRL has one."""

from collections.abc import Iterable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from medrl.training.update import Update
from medrl.types import Groups, relative_to


def step_metrics(groups: Groups, update: Update) -> dict[str, Any]:
    """One row of metrics.jsonl, without the times. Reward figures are there only where completions were sampled."""
    return {**_rewards(groups), **_update(update), **_lengths(groups)}


def _rewards(groups: Groups) -> dict[str, float]:
    scored = [rollout for rollout in groups.rollouts if rollout.score.parts]
    if not scored:
        return {}
    spreads = [stdev(rewards) for rewards in groups.rewards if len(rewards) > 1]
    return {
        "reward": fmean(rollout.score.value for rollout in scored),
        "reward_std": fmean(spreads) if spreads else 0.0,
        "frac_reward_zero_std": fmean(len(set(rewards)) == 1 for rewards in groups.rewards),
        **{f"rewards/{part}/mean": fmean(r.score.parts[part] for r in scored) for part in scored[0].score.parts},
        "parse_fail_rate": fmean(rollout.score.answer is None for rollout in scored),
    }


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
    if update.sampling_gap is not None:
        row["sampling_gap"] = update.sampling_gap
    return row


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
    step: int, groups: Groups, advantages: Iterable[Iterable[float]], root: Path | None = None
) -> list[dict[str, Any]]:
    """Rows of rollouts.jsonl: every completion with its reward, parts and advantage; images relative to ``root``."""
    return [
        {
            "step": step,
            "prompt_id": group.prompt.id,
            "images": [relative_to(image, root) for image in group.prompt.images],
            "completion": rollout.completion.text,
            "finish_reason": rollout.completion.finish_reason,
            "reward": rollout.score.value,
            "parts": rollout.score.parts,
            "answer": rollout.score.answer,
            "target": group.example.target,
            "advantage": advantage,
        }
        for group, values in zip(groups, advantages, strict=True)
        for rollout, advantage in zip(group.rollouts, values, strict=True)
    ]
