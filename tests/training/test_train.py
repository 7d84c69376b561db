import pytest
import torch

from medrl.errors import (
    DataError,
    NonFiniteError,
    PolicyError,
    PromptTooLongError,
    RewardError,
    RunError,
    SettingsError,
)
from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.rewards import from_weights
from medrl.rollout.sampling import Sampling
from medrl.runs import locked
from medrl.sft import SFT
from medrl.training.checkpoint import list_checkpoints
from medrl.training.optim import Optim
from medrl.training.train import Training, train
from medrl.types import Score

GRPO_2 = GRPO(group_size=2, kl_coef=0.04)

METRICS = {
    "step", "reward", "reward_std", "frac_reward_zero_std", "rewards/choice_correct/mean", "rewards/well_formed/mean",
    "parse_fail_rate", "completions/mean_length", "completions/clipped_ratio", "entropy", "kl", "grad_norm", "lr",
    "loss", "time/data_s", "time/rollout_s", "time/update_s", "time/step_s", "tokens_per_s", "eta_s",
}  # fmt: skip


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


# ---------------------------------------------------------------- it learns


def test_a_policy_learns_to_write_what_is_rewarded(make_policy, examples, tmp_path):
    policy = make_policy(torch.float32, spread=1.0)

    def even(example, completion):
        if not completion.token_ids:  # the check of right answers
            return Score(value=float(example.target in completion.text), answer=example.target)
        share = sum(token % 2 == 0 for token in completion.token_ids) / len(completion.token_ids)
        return Score(value=share, parts={"even": share}, answer="A")

    run = train(
        policy, examples, even, GRPO(group_size=8, kl_coef=0), out=tmp_path / "run", quiet=True,
        steps=30, prompts_per_step=4, template="plain", sampling=Sampling(max_new_tokens=8), optim=Optim(lr=0.02),
    )  # fmt: skip
    rewards = [row["reward"] for row in run.metrics()]
    assert len(rewards) == 30
    assert sum(rewards[:3]) / 3 < 0.6  # about half of all tokens are even
    assert sum(rewards[-5:]) / 5 > 0.85


def test_supervised_training_lowers_its_loss_and_the_right_letter_becomes_likely(make_policy, examples, tmp_path):
    policy = make_policy(torch.float32, spread=1.0)
    run = train(
        policy, examples, from_weights({"choice_correct": 1.0}), SFT(), out=tmp_path / "run", quiet=True,
        steps=30, prompts_per_step=4, mode="no_think", template="plain-no-think", optim=Optim(lr=0.01),
    )  # fmt: skip
    rows = run.metrics()
    assert rows[-1]["loss"] < 0.3 * rows[0]["loss"]
    assert "reward" not in rows[0]  # nothing was sampled, so there is nothing to report of it
    assert next(run.rollouts())["completion"] in {f"<answer>{letter}</answer>" for letter in "ABCD"}


# ---------------------------------------------------------------- what a run leaves


def test_a_run_leaves_every_metric_rollout_and_checkpoint_it_promises(model_folder, examples, small, tmp_path):
    policy = Policy.load(model_folder)
    reward = from_weights({"choice_correct": 1.0, "well_formed": 0.5})
    run = train(policy, examples, reward, GRPO_2, out=tmp_path / "run", settings=small, quiet=True)
    rows = run.metrics()
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert [METRICS - row.keys() for row in rows] == [set()] * 5
    assert [row["lr"] for row in rows] == pytest.approx([1e-3, 8e-4, 6e-4, 4e-4, 2e-4])
    assert rows[0]["kl"] == pytest.approx(0, abs=1e-6)
    assert rows[0]["sampling_gap"] < 1e-5
    assert rows[-1]["eta_s"] == 0

    rollouts = list(run.rollouts())
    assert len(rollouts) == 5 * 2 * 2
    known = {example.id: example for example in examples}
    for row in rollouts:
        example = known[row["prompt_id"]]
        assert (row["target"], row["images"]) == (example.target, [str(example.images[0])])
        assert row["parts"].keys() == {"choice_correct", "well_formed"}
        assert row["reward"] == pytest.approx(row["parts"]["choice_correct"] + 0.5 * row["parts"]["well_formed"])
    for first, second in zip(rollouts[::2], rollouts[1::2], strict=True):
        assert first["prompt_id"] == second["prompt_id"]
        assert first["advantage"] == pytest.approx(-second["advantage"])

    assert [path.name for path in list_checkpoints(run.checkpoints)] == ["step-000004", "step-000005"]
    last = Policy.load(run.checkpoints / "step-000005")
    assert all(torch.equal(tensor, weights_of(policy)[name]) for name, tensor in weights_of(last).items())
    assert run.recipe["steps"] == 5 and run.recipe["objective"]["kl_coef"] == 0.04
    assert run.provenance["seconds"] > 0


def test_the_same_seed_trains_the_same_weights_and_another_seed_others(model_folder, examples, lively, small, tmp_path):
    trained = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        policy = Policy.load(model_folder)
        settings = small.model_copy(update={"seed": seed, "steps": 2})
        train(policy, examples, lively, GRPO_2, out=tmp_path / name, settings=settings, quiet=True)
        trained.append(weights_of(policy))
    first, same, other = trained
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_frozen_vision_tower_stays_as_it_is(model_folder, examples, lively, small, tmp_path):
    policy = Policy.load(model_folder)
    policy.family.vision.requires_grad_(False)
    before = weights_of(policy)
    train(policy, examples, lively, GRPO_2, out=tmp_path / "run", settings=small, quiet=True)
    changed = {name for name, tensor in weights_of(policy).items() if not torch.equal(tensor, before[name])}
    assert changed and not any("visual" in name for name in changed)


# ---------------------------------------------------------------- what stops a run before it starts


def refused(error, words, policy, examples, reward, objective, tmp_path, **options):
    with pytest.raises(error, match=words):
        train(policy, examples, reward, objective, out=tmp_path / "run", quiet=True, **options)
    assert not (tmp_path / "run").exists()


def test_a_reward_that_rejects_right_answers_is_refused(policy, examples, tmp_path):
    def letter_a(example, completion):
        right = "<answer>A</answer>" in completion.text
        return Score(value=float(right), answer="A", explanation="only A is right")

    words = r"right answer of 5 of 7 examples(?s:.*)\n  example-1: 0. only A is right"
    refused(RewardError, words, policy, examples, letter_a, GRPO_2, tmp_path)


def test_what_cannot_be_trained_on_is_refused(policy, examples, lively, tmp_path):
    refused(DataError, "empty", policy, [], lively, GRPO_2, tmp_path)
    refused(SettingsError, "no prompt template", policy, examples, lively, GRPO_2, tmp_path, template="plainer")
    refused(SettingsError, "seconds_per_step", policy, examples, lively, GRPO_2, tmp_path, seconds_per_step=3)
    long = Sampling(max_new_tokens=1000)
    refused(
        PromptTooLongError,
        "example-.*max_new_tokens",
        policy,
        examples,
        lively,
        GRPO(kl_coef=0),
        tmp_path,
        sampling=long,
    )
    greedy = Sampling(temperature=0, max_new_tokens=5)
    no_kl = GRPO(kl_coef=0)
    refused(SettingsError, "temperature is 0", policy, examples, lively, no_kl, tmp_path, sampling=greedy)


def test_a_policy_without_a_start_to_compare_with_is_refused_where_a_kl_term_needs_one(
    make_policy, examples, lively, tmp_path
):
    short = Sampling(max_new_tokens=5)
    refused(PolicyError, "freeze_reference", make_policy(), examples, lively, GRPO_2, tmp_path, sampling=short)


def test_a_reward_that_is_not_finite_stops_the_run_and_the_last_checkpoint_is_whole(
    model_folder, examples, lively, small, tmp_path
):
    scored = []

    def breaking(example, completion):
        score = lively(example, completion)
        if completion.token_ids:
            scored.append(example.id)
        return Score(value=float("nan")) if len(scored) > 10 else score

    with pytest.raises(NonFiniteError, match="example-"):
        train(Policy.load(model_folder), examples, breaking, GRPO_2, out=tmp_path / "run", settings=small, quiet=True)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-000002"]


def test_settings_outside_their_range_are_refused():
    for name in ("steps", "prompts_per_step", "save_every", "keep_checkpoints", "tokens_per_micro_batch"):
        with pytest.raises(SettingsError, match=name):
            Training(**{name: 0})


def test_a_run_that_another_process_trains_is_neither_started_nor_resumed(
    model_folder, examples, lively, small, tmp_path
):
    one = small.model_copy(update={"steps": 1})
    with locked(tmp_path / "new"), pytest.raises(RunError, match=r"is being trained into by process \d+ on "):
        train(Policy.load(model_folder), examples, lively, GRPO_2, out=tmp_path / "new", settings=one, quiet=True)
    train(Policy.load(model_folder), examples, lively, GRPO_2, out=tmp_path / "run", settings=one, quiet=True)
    with locked(tmp_path / "run"), pytest.raises(RunError, match="is being trained into"):
        train(
            Policy.load(model_folder), examples, lively, GRPO_2,
            out=tmp_path / "run", settings=one, resume="auto", quiet=True,
        )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [".lock"]


def test_what_a_kill_left_of_a_file_is_cleared_away_on_resume(model_folder, examples, lively, small, tmp_path):
    options = {"out": tmp_path / "run", "settings": small.model_copy(update={"steps": 1}), "quiet": True}
    train(Policy.load(model_folder), examples, lively, GRPO_2, **options)
    (tmp_path / "run" / ".provenance.json.0123abcd.tmp").write_text("{")  # killed in the last line of a run
    train(Policy.load(model_folder), examples, lively, GRPO_2, resume="auto", **options)
    assert [path.name for path in (tmp_path / "run").iterdir() if "tmp" in path.name] == []
