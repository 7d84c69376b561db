"""NaN and infinity, wherever they come from: the run stops before a weight moves, and names the sample."""

import math
from dataclasses import replace

import pytest
import torch

from medrl.errors import CheckpointError, MedrlError, NonFiniteError, SettingsError
from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.rollout import collect
from medrl.training.checkpoint import list_checkpoints, verify
from medrl.training.group_relative import GroupRelative
from medrl.training.state import RunState
from medrl.training.train import train
from medrl.types import Score

OBJECTIVE = GRPO(group_size=2, kl_coef=0.04)


def reward_of(value: float, part: float = 1.0):
    def plant(patch, policy):
        def reward(example, completion):
            return Score(value=value, parts={"odd": part}, answer="A")

        patch.setattr(GroupRelative, "collect", _with_reward(GroupRelative.collect, reward))

    return plant


def _with_reward(inner, reward):
    def collect_with(self, draw, step):
        self.setup = replace(self.setup, reward=reward)
        return inner(self, draw, step)

    return collect_with


def pixels(value: float):
    def plant(patch, policy):
        inner = Policy.encode

        def encode(self, prompts, **options):
            encoded = inner(self, prompts, **options)
            broken = encoded[0].pixels.clone()
            broken[3, 5] = value
            return [replace(encoded[0], pixels=broken), *encoded[1:]]

        patch.setattr(Policy, "encode", encode)

    return plant


def weight(value: float):
    def plant(patch, policy):
        with torch.no_grad():
            policy.model.model.language_model.layers[1].mlp.up_proj.weight[0, 0] = value

    return plant


def advantage(value: float):
    def plant(patch, policy):
        inner = GroupRelative.advantages

        def advantages(self, groups):
            found = inner(self, groups).clone()
            found[0, 0] = value
            return found

        patch.setattr(GroupRelative, "advantages", advantages)

    return plant


def training_pass(field: str, value: float, *, of_reference: bool = False):
    def plant(patch, policy):
        inner = Policy.logprobs

        def logprobs(self, *arguments, **options):
            scored = inner(self, *arguments, **options)
            if (self is not policy) != of_reference:
                return scored
            mask = torch.zeros_like(scored.completion_mask, dtype=torch.bool)
            mask[0, 0] = True
            return replace(scored, **{field: getattr(scored, field).masked_fill(mask, value)})

        patch.setattr(Policy, "logprobs", logprobs)

    return plant


def gradient(value: float):
    def plant(patch, policy):
        parameter = policy.model.model.language_model.layers[0].mlp.down_proj.weight
        handle = parameter.register_hook(lambda grad: grad * value)
        patch.setattr(policy, "hook", handle, raising=False)

    return plant


def sampled(value: float):
    def plant(patch, policy):
        inner = collect.generate

        def generate(*arguments, **options):
            groups = inner(*arguments, **options)
            first = groups[0][0]
            broken = replace(first, sampling_logprobs=(value, *first.sampling_logprobs[1:]))
            return [[broken, *groups[0][1:]], *groups[1:]]

        patch.setattr(collect, "generate", generate)

    return plant


PLACES = {
    "reward is NaN": reward_of(math.nan),
    "reward is infinite": reward_of(-math.inf),
    "part of a reward is NaN": reward_of(1.0, math.nan),
    "pixel is NaN": pixels(math.nan),
    "pixel is infinite": pixels(math.inf),
    "weight is NaN": weight(math.nan),
    "weight is infinite": weight(math.inf),
    "advantage is NaN": advantage(math.nan),
    "advantage is infinite": advantage(math.inf),
    "advantage overflows the gradient": advantage(1e308),
    "log-probability of the sampler is NaN": sampled(math.nan),
    "log-probability of the policy is NaN": training_pass("logprobs", math.nan),
    "log-probability of the reference is NaN": training_pass("logprobs", math.nan, of_reference=True),
    "entropy is NaN, which is only reported": training_pass("entropy", math.nan),
    "gradient is NaN": gradient(math.nan),
    "gradient is infinite": gradient(math.inf),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_not_finite_stops_the_run_before_the_weights_change_and_names_the_sample(
    model_folder, examples, lively, small, tmp_path, place
):
    policy = Policy.load(model_folder)
    before: list[str] = []
    inner = RunState.begin

    def begin(self, step):
        inner(self, step)
        if step == 1:  # one step has gone well
            PLACES[place](patch, policy)
            before.append(policy.fingerprint())
            before.append(repr(self.optimizer.state_dict()))

    settings = small.model_copy(update={"save_every": 1})
    with pytest.MonkeyPatch.context() as patch, pytest.raises(MedrlError, match="example-") as caught:
        patch.setattr(RunState, "begin", begin)
        train(policy, examples, lively, OBJECTIVE, out=tmp_path / "run", settings=settings, quiet=True)
    assert isinstance(caught.value, NonFiniteError)
    assert policy.fingerprint() == before[0]
    checkpoints = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [path.name for path in checkpoints] == ["step-000001"]
    verify(checkpoints[0])


def broken_in(steps, begun):
    """A reward that is NaN in some steps, for one of their examples; ``begun`` gets the weights of each step."""
    inner, now = RunState.begin, []

    def begin(self, step):
        inner(self, step)
        now[:] = [step]
        begun.append(self.policy.fingerprint())

    def reward(example, completion):
        score = lively_value(example, completion)
        broken = (
            completion.token_ids and now and now[0] in steps and example.id == culprits.setdefault(now[0], example.id)
        )
        return replace(score, value=math.nan) if broken else score

    culprits: dict[int, str] = {}
    return begin, reward, culprits


def lively_value(example, completion):
    right = f"<answer>{example.target}</answer>" in completion.text
    noise = sum(completion.token_ids) % 7 / 7
    return Score(value=float(right) + noise * 0.5, parts={"noise": noise}, answer=example.target if right else None)


def test_a_step_may_be_left_out_in_writing_and_a_resumed_run_does_the_same(
    model_folder, examples, small, tmp_path, monkeypatch
):
    class Killed(BaseException):
        pass

    settings = small.model_copy(update={"on_nonfinite": "skip", "max_skips": 2})
    ends, kill_at = {}, [None]
    for name, dies in (("whole", None), ("killed", 3)):
        begun: list[str] = []
        begin, reward, culprits = broken_in({1, 2}, begun)
        kill_at[0] = dies

        def look(self, step, begin=begin):
            begin(self, step)
            if step == kill_at[0]:
                kill_at[0] = None
                raise Killed

        monkeypatch.setattr(RunState, "begin", look)
        options = {"out": tmp_path / name, "settings": settings, "quiet": True}
        if dies is not None:
            with pytest.raises(Killed):
                train(Policy.load(model_folder), examples, reward, OBJECTIVE, **options)
        run = train(Policy.load(model_folder), examples, reward, OBJECTIVE, resume="auto", **options)
        ends[name] = (begun[-1], run.quarantine(), [row.get("skipped_steps") for row in run.metrics()])
        rows = [row["step"] for row in run.rollouts()]
        assert [rows.count(step) for step in range(5)] == [4, 0, 0, 4, 4]
    assert ends["killed"] == ends["whole"]
    _, quarantine, skipped = ends["whole"]
    assert skipped == [None, 1, 2, None, None]
    assert [row["step"] for row in quarantine] == [1, 2]
    assert all(culprits[row["step"]] in row["reason"] for row in quarantine)


def test_a_step_that_is_left_out_leaves_weights_and_moments_as_they_were(
    model_folder, examples, small, tmp_path, monkeypatch
):
    begun: list[str] = []
    begin, reward, _ = broken_in({1}, begun)
    monkeypatch.setattr(RunState, "begin", begin)
    settings = small.model_copy(update={"on_nonfinite": "skip"})
    train(Policy.load(model_folder), examples, reward, OBJECTIVE, out=tmp_path / "run", settings=settings, quiet=True)
    assert begun[1] == begun[2] and len({*begun}) == 4


def test_more_steps_than_may_be_left_out_end_the_run(model_folder, examples, small, tmp_path, monkeypatch):
    begin, reward, _ = broken_in({0, 1}, [])
    monkeypatch.setattr(RunState, "begin", begin)
    settings = small.model_copy(update={"on_nonfinite": "skip", "max_skips": 1})
    with pytest.raises(NonFiniteError, match=r"example-\d.*1 steps were left out before it.*max_skips"):
        train(
            Policy.load(model_folder), examples, reward, OBJECTIVE, out=tmp_path / "run", settings=settings, quiet=True
        )


def test_steps_of_which_a_part_was_learned_cannot_be_left_out(model_folder, examples, small, tmp_path):
    settings = small.model_copy(update={"on_nonfinite": "skip"})
    with pytest.raises(SettingsError, match=r"on_nonfinite is 'skip', but with grpo.updates_per_rollout above 1"):
        train(
            Policy.load(model_folder), examples, lively_value, GRPO(group_size=2, updates_per_rollout=2),
            out=tmp_path / "run", settings=settings, quiet=True,
        )  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_moments_that_are_not_finite_are_not_loaded(model_folder, examples, lively, small, tmp_path, monkeypatch):
    from medrl.training import state

    options = {"out": tmp_path / "run", "settings": small, "quiet": True}
    train(Policy.load(model_folder), examples, lively, OBJECTIVE, **options)
    inner = state.load_state

    def broken(path):
        tensors, values = inner(path)
        name = next(name for name in tensors if name.endswith(".exp_avg_sq"))
        tensors[name].view(-1)[0] = math.inf
        return tensors, values

    monkeypatch.setattr(state, "load_state", broken)
    with pytest.raises(NonFiniteError, match=r"exp_avg_sq that is not finite"):
        train(Policy.load(model_folder), examples, lively, OBJECTIVE, resume="must", **options)


def test_a_checkpoint_of_another_run_is_refused(model_folder, examples, lively, small, tmp_path):
    short = small.model_copy(update={"steps": 1})
    runs = [
        train(
            Policy.load(model_folder), examples, lively, OBJECTIVE,
            out=tmp_path / str(seed), settings=short.model_copy(update={"seed": seed}), quiet=True,
        )
        for seed in (1, 2)
    ]  # fmt: skip
    (checkpoint,) = list_checkpoints(runs[0].checkpoints)
    checkpoint.rename(runs[1].checkpoints / "step-000009")
    with pytest.raises(CheckpointError, match=r"step-000009 is of another run: its recipe_sha256"):
        train(
            Policy.load(model_folder), examples, lively, OBJECTIVE,
            out=tmp_path / "2", settings=short.model_copy(update={"seed": 2}), resume="must", quiet=True,
        )  # fmt: skip
