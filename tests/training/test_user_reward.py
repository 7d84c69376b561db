"""A reward of the user's own, named in a recipe: it trains, and what it does wrong stops the run with the sample."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from medrl.data.store import write_store
from medrl.errors import NonFiniteError, RewardError, RunError, SettingsError
from medrl.runs import write_json_atomically
from medrl.training.recipe import run_recipe

REWARDS = """
from medrl.types import Score

def lesion_size(example, completion):
    right = f"<answer>{example.target}</answer>" in completion.text
    return Score(value=right + sum(completion.token_ids) % 7 / 7 * 0.5 * (not right), parts={"right": float(right)})

def batched(example, completion):
    return [1.0, 0.0]

def nan_on_real_completions(example, completion):
    return float("nan") if completion.token_ids else 1.0 * ("<answer>" in completion.text)

def raises_on_real_completions(example, completion):
    return 1.0 * ("<answer>" in completion.text) if not completion.token_ids else example.masks[0]

def only_a(example, completion):
    return 1.0 * ("<answer>A</answer>" in completion.text)

def right_or_not(example, completion):
    return f"<answer>{example.target}</answer>" in completion.text

def polite(example, completion):
    return 0.5 * bool(completion.text)

def bare(example, completion):
    return Score(value=float(f"<answer>{example.target}</answer>" in completion.text))

def half(example, completion):
    return 0.5
"""


@pytest.fixture
def recipe(examples, model_folder, small, tmp_path) -> Path:
    write_store(tmp_path / "store", examples, source="noise", license="none")
    (tmp_path / "my_rewards.py").write_text(REWARDS)
    content = {
        "policy": {"model": str(model_folder), "dtype": "float32"},
        "data": {"train": str(tmp_path / "store")},
        "grpo": {"group_size": 2, "kl_coef": 0.0},
        "reward": "my_rewards.py:lesion_size",
        "training": {**small.model_dump(), "steps": 1},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content))
    return tmp_path / "recipe.yaml"


def test_a_function_beside_the_recipe_trains_and_is_recorded(recipe, tmp_path):
    run = run_recipe(recipe, out=tmp_path / "run", quiet=True)
    assert run.recipe["reward"] == "my_rewards.py:lesion_size"
    digest = hashlib.sha256((tmp_path / "my_rewards.py").read_bytes()).hexdigest()
    assert run.provenance["reward_files"] == {"my_rewards.py": digest}
    assert {frozenset(row["parts"]) for row in run.rollouts()} == {frozenset({"right"})}


def test_a_run_is_not_resumed_with_a_reward_file_that_has_changed(recipe, tmp_path):
    run = run_recipe(recipe, out=tmp_path / "run", quiet=True)
    file = tmp_path / "my_rewards.py"
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    file.write_text(REWARDS.replace("/ 7 * 0.5", "/ 7 * 0.1"))
    with pytest.raises(RunError, match=rf"^my_rewards\.py has changed .*my_rewards\.py: {digest[:12]}\), or choose"):
        run_recipe(recipe, out=run.path, resume="auto", quiet=True)
    file.write_text(REWARDS)
    assert run_recipe(recipe, out=run.path, resume="must", quiet=True).metrics() == run.metrics()


def test_a_run_of_before_reward_files_were_recorded_is_resumed(recipe, tmp_path):
    run = run_recipe(recipe, out=tmp_path / "run", quiet=True)
    old = {name: fact for name, fact in run.provenance.items() if name != "reward_files"}
    write_json_atomically(run.path / "provenance.json", old)
    run_recipe(recipe, out=run.path, resume="must", quiet=True)


def test_a_function_that_says_right_or_not_trains(recipe, tmp_path):
    run = run_recipe(recipe, ["reward=my_rewards.py:right_or_not"], out=tmp_path / "run", quiet=True)
    assert {row["parts"]["right_or_not"] for row in run.rollouts()} <= {0.0, 1.0}


def test_a_score_without_parts_is_reported(recipe, tmp_path):
    run = run_recipe(recipe, ["reward=my_rewards.py:bare"], out=tmp_path / "run", quiet=True)
    (row,) = run.metrics()
    assert row["reward"] == pytest.approx(sum(r["reward"] for r in run.rollouts()) / len(list(run.rollouts())))
    assert {"reward_std", "frac_reward_zero_std", "parse_fail_rate", "pass@1"} <= row.keys()


def test_a_step_of_two_sources_with_rewards_of_other_parts_is_reported(recipe, examples, tmp_path):
    rows = [replace(row, source="other" if i % 2 else "noise") for i, row in enumerate(examples)]
    write_store(tmp_path / "mixed", rows, source="both", license="none")
    override = "reward={by_source: {noise: {answer_correct: 1.0}, other: my_rewards.py:lesion_size}}"
    count = f"training.prompts_per_step={len(rows)}"
    run = run_recipe(recipe, [override, f"data.train={tmp_path / 'mixed'}", count], out=tmp_path / "run", quiet=True)
    (row,) = run.metrics()
    assert {"rewards/answer_correct/mean", "rewards/right/mean"} <= row.keys()


def test_a_function_that_gives_wrong_answers_as_much_is_warned_about(recipe, tmp_path):
    with pytest.warns(
        UserWarning, match=r"as much as the right one for 7 of the first 7 examples \(0\.5 for example-0\)"
    ):
        run_recipe(recipe, ["reward=my_rewards.py:polite"], out=tmp_path / "run", quiet=True)


def test_rewards_by_source_are_read_from_a_recipe(recipe, tmp_path):
    override = "reward={by_source: {noise: {answer_correct: 1.0, my_rewards.py:only_a: 0.0}}}"
    run = run_recipe(recipe, [override], out=tmp_path / "run", quiet=True)
    assert {frozenset(row["parts"]) for row in run.rollouts()} == {frozenset({"answer_correct", "only_a"})}


@pytest.mark.parametrize(
    ("reward", "error", "words"),
    [
        ("my_rewards.py:batched", RewardError, r"batched on example 'example-0' .*a list, 2 values"),
        ("my_rewards.py:only_a", RewardError, r"right answer of 5 of 7 examples(?s:.*)\n  example-1: 0"),
        ("my_rewards.py:half", RewardError, r"no more than to an empty completion, .* 7 of 7 examples"),
        ("my_rewards.py:lesion_volume", SettingsError, "has no lesion_volume; did you mean lesion_size"),
        ("rewards_of_mine.py:f", SettingsError, "there is no file rewards_of_mine.py"),
        ("{choice_corect: 1.0}", SettingsError, "did you mean 'choice_correct'"),
    ],
)
def test_what_is_wrong_with_it_shows_before_a_run_is_made(recipe, tmp_path, reward, error, words):
    with pytest.raises(error, match=words):
        run_recipe(recipe, [f"reward={reward}"], out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("reward", "error", "words"),
    [
        ("nan_on_real_completions", NonFiniteError, r"on example 'example-\d' \(completion .*returned nan"),
        ("raises_on_real_completions", RewardError, r"on example 'example-\d' \(completion .*raised AttributeError"),
    ],
)
def test_what_goes_wrong_in_a_step_stops_it_with_the_sample_named_and_writes_no_step(
    recipe, tmp_path, reward, error, words
):
    with pytest.raises(error, match=words):
        run_recipe(recipe, [f"reward=my_rewards.py:{reward}"], out=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists() and not (tmp_path / "run" / "checkpoints").exists()
