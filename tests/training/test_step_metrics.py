from dataclasses import replace
from pathlib import Path

import pytest

from medrl.training.metrics import rollout_rows, step_metrics
from medrl.training.totals import Measured, Update
from medrl.types import Completion, Example, Group, Groups, Prompt, Rollout, Score

UPDATE = Update(
    loss=0.5, policy_loss=0.25, kl=0.125, clip_fraction=0.0, entropy=2.0, grad_norm=3.0, lr=1e-3,
    sampling_gap=None, skipped_groups=1, tokens=40,
)  # fmt: skip


def rollout(value: float, length: int, *, answer: str | None = "A", ended: bool = True, **parts: float) -> Rollout:
    return Rollout(
        completion=Completion(
            text="x" * length, token_ids=tuple(range(length)), finish_reason="stop" if ended else "length"
        ),
        score=Score(value=value, parts=parts, answer=answer),
    )


def group(name: str, *rollouts: Rollout) -> Group:
    image = Path("/stores/ct/images") / f"{name}.png"
    example = Example(id=name, source="s", images=(image,), question="?", options=("a", "b"), target="B")
    prompt = Prompt(id=name, text="?", images=(image,), mode="think")
    return Group(example=example, prompt=prompt, rollouts=rollouts)


GROUPS = Groups(
    (
        group("one", rollout(1.0, 4, right=1.0, form=0.0), rollout(2.0, 6, right=1.0, form=1.0)),
        group("two", rollout(0.0, 9, answer=None, ended=False, right=0.0, form=0.0), rollout(0.0, 5, right=0, form=0)),
    )
)


def test_a_row_holds_the_figures_worked_out_by_hand():
    row = step_metrics(GROUPS, UPDATE)
    assert row == {
        "reward": 0.75,
        "reward_std": pytest.approx(0.5**0.5 / 2),  # of 1 and 2, and of 0 and 0
        "frac_reward_zero_std": 0.5,
        "rewards/right/mean": 0.5,
        "rewards/form/mean": 0.25,
        "parse_fail_rate": 0.25,
        "loss": 0.5,
        "policy_loss": 0.25,
        "kl": 0.125,
        "clip_fraction": 0.0,
        "entropy": 2.0,
        "grad_norm": 3.0,
        "lr": 1e-3,
        "skipped_groups": 1,
        "training_tokens": 40,
        "completions/mean_length": 6.0,
        "completions/min_length": 4,
        "completions/max_length": 9,
        "completions/mean_terminated_length": 5.0,
        "completions/clipped_ratio": 0.25,
        "tags_off": 1.0,
        "answer_letters": {"A": 3, "B": 0},
        "target_letters": {"A": 0, "B": 4},
        "completions/mean_length_wrong": 6.0,  # of 4, 6, 9 and 5; none is right
        "pass@1": 0.0,
        "pass@2": 0.0,
    }


def test_demonstrations_report_no_reward():
    shown = step_metrics(Groups((group("one", rollout(1.0, 3)),), sampled=False), UPDATE)
    assert not [name for name in shown if "reward" in name or name == "parse_fail_rate"]
    assert shown["completions/mean_length"] == 3


def test_a_part_s_mean_is_over_the_completions_that_have_it():
    choice = group("one", rollout(1.0, 4, right=1.0, form=1.0), rollout(0.0, 4, right=0.0, form=0.0))
    number = group("two", rollout(0.5, 4, form=1.0, near=0.25), rollout(0.5, 4, form=1.0, near=0.75))
    for step in ((choice, number), (number, choice)):
        row = step_metrics(Groups(step), UPDATE)
        means = {name: value for name, value in row.items() if name.startswith("rewards/")}
        assert means == {"rewards/right/mean": 0.5, "rewards/form/mean": 0.75, "rewards/near/mean": 0.5}
        assert row["reward"] == 0.5


def test_a_reward_without_parts_is_a_reward():
    row = step_metrics(Groups((group("one", rollout(1.0, 4), rollout(0.0, 4, answer=None)),)), UPDATE)
    assert (row["reward"], row["reward_std"], row["frac_reward_zero_std"]) == (0.5, pytest.approx(0.5**0.5), 0.0)
    assert (row["parse_fail_rate"], row["pass@2"]) == (0.5, 0.0) and "tags_off" in row
    assert not [name for name in row if name.startswith("rewards/")]


def test_every_completion_has_its_row_with_its_own_advantage():
    seen = Measured(entropy=1.5, kl=None, sampling_gap=0.25)
    update = replace(UPDATE, completions=((seen, seen), None))
    rows = rollout_rows(7, GROUPS, [[-1.0, 1.0], [0.0, 0.0]], update, Path("/stores/ct"))
    assert [(row["prompt_id"], row["reward"], row["advantage"]) for row in rows] == [
        ("one", 1.0, -1.0),
        ("one", 2.0, 1.0),
        ("two", 0.0, 0.0),
        ("two", 0.0, 0.0),
    ]
    assert rows[2] == {
        "step": 7,
        "prompt_id": "two",
        "images": ["images/two.png"],
        "completion": "x" * 9,
        "finish_reason": "length",
        "reward": 0.0,
        "parts": {"right": 0.0, "form": 0.0},
        "answer": None,
        "target": "B",
        "right": False,
        "advantage": 0.0,
        "tokens": 9,
        "implied": None,
        "tags_off": True,
    }
    assert (rows[1]["entropy"], rows[1]["sampling_gap"], "kl" in rows[1]) == (1.5, 0.25, False)


def test_groups_that_were_drawn_and_left_out_count_among_those_that_teach_nothing():
    left_out = group("three", rollout(1.0, 4, right=1.0), rollout(1.0, 4, right=1.0))
    row = step_metrics(Groups(GROUPS.items[:1], dropped=(left_out, left_out)), UPDATE)
    assert (row["frac_reward_zero_std"], row["dropped_groups"]) == (2 / 3, 2)
    assert row["reward"] == 1.5  # of what was kept


def test_a_kl_in_the_reward_is_reported_per_token():
    row = step_metrics(Groups((group("one", rollout(1.0, 4, kl=0.5), rollout(2.0, 6, kl=-0.1)),)), UPDATE)
    assert row["kl"] == pytest.approx(0.4 / 10)
