import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.errors import SettingsError
from medrl.grpo import GRPO, REDUCTIONS, clipped_objective, k3_kl, policy_loss

NO_KL = GRPO(kl_coef=0)


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def random_step(seed: int, completions: int = 5, tokens: int = 7) -> dict[str, torch.Tensor]:
    """Log-probabilities around -2, ratios on both sides of the clip, completions of many lengths, 0 included."""
    random = np.random.default_rng(seed)
    lengths = random.integers(0, tokens + 1, completions)
    logprobs = -random.exponential(2.0, (completions, tokens))
    arrays = {
        "logprobs": logprobs,
        "old_logprobs": logprobs + random.normal(0, 0.3, logprobs.shape),
        "ref_logprobs": logprobs + random.normal(0, 0.5, logprobs.shape),
        "advantages": random.normal(0, 1, (completions, 1)),
        "completion_mask": (np.arange(tokens) < lengths[:, None]).astype(float),
    }
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def reference_loss(step: dict[str, np.ndarray], grpo: GRPO, on_policy: bool) -> tuple[float, np.ndarray]:
    """The loss and its gradient, token by token as the papers write them, in plain Python and float64."""
    mask, total = step["completion_mask"], step["completion_mask"].sum()
    loss, gradient = 0.0, np.zeros_like(mask)
    for i in range(len(mask)):
        for t in np.flatnonzero(mask[i]):
            advantage, lp = step["advantages"][i, 0], step["logprobs"][i, t]
            ratio = 1.0 if on_policy else math.exp(lp - step["old_logprobs"][i, t])
            clipped = min(max(ratio, 1 - grpo.clip_low), 1 + grpo.clip_high)
            objective = min(ratio * advantage, clipped * advantage)
            slope = ratio * advantage if ratio * advantage <= clipped * advantage else 0.0
            toward = math.exp(step["ref_logprobs"][i, t] - lp)
            kl = toward - (step["ref_logprobs"][i, t] - lp) - 1
            weight = 1 / total if grpo.reduction == "token" else 1 / (len(mask) * mask[i].sum())
            loss += weight * (-objective + grpo.kl_coef * kl)
            gradient[i, t] = weight * (-slope + grpo.kl_coef * (1 - toward))
    return loss, gradient


def loss_of(step, grpo, rows=slice(None), on_policy=False):
    weights = REDUCTIONS[grpo.reduction](step["completion_mask"].sum(1))
    return policy_loss(
        step["logprobs"][rows],
        step["advantages"][rows],
        step["completion_mask"][rows],
        weights[rows],
        grpo,
        old_logprobs=None if on_policy else step["old_logprobs"][rows],
        ref_logprobs=step["ref_logprobs"][rows],
    )


grpo_settings = st.builds(
    GRPO,
    kl_coef=st.sampled_from([0.0, 0.04, 1.0]),
    clip_low=st.floats(0.05, 0.9),
    clip_high=st.floats(0.05, 0.9),
    reduction=st.sampled_from(["sequence", "token"]),
)


@settings(deadline=None, max_examples=200)
@given(st.integers(0, 2**32 - 1), grpo_settings, st.booleans())
def test_loss_and_gradient_agree_with_the_formulas_in_float64(seed, grpo, on_policy):
    step = random_step(seed)
    step["logprobs"].requires_grad_()
    terms = loss_of(step, grpo, on_policy=on_policy)
    terms.loss.backward()
    expected, gradient = reference_loss({k: v.detach().numpy() for k, v in step.items()}, grpo, on_policy)
    assert terms.loss.item() == pytest.approx(expected, rel=1e-9, abs=1e-9)
    np.testing.assert_allclose(gradient_of(step["logprobs"]).numpy(), gradient, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 2**32 - 1), grpo_settings, st.sampled_from([[1, 1, 1, 1, 1], [2, 3], [4, 1], [5]]))
def test_splitting_a_step_into_micro_batches_gives_the_same_gradient(seed, grpo, sizes):
    step = random_step(seed)
    whole, parts = step["logprobs"].clone().requires_grad_(), step["logprobs"].clone().requires_grad_()
    full = loss_of({**step, "logprobs": whole}, grpo)
    full.loss.backward()
    shares, start = [], 0
    for size in sizes:
        shares.append(loss_of({**step, "logprobs": parts}, grpo, slice(start, start + size)))
        shares[-1].loss.backward()
        start += size
    torch.testing.assert_close(gradient_of(parts), gradient_of(whole), rtol=1e-12, atol=1e-12)
    for name in ("loss", "policy", "kl", "clip_fraction"):
        total = sum(getattr(share, name).item() for share in shares)
        assert total == pytest.approx(getattr(full, name).item(), rel=1e-9, abs=1e-12)


def test_a_token_past_the_clip_gets_no_gradient():
    logprobs = torch.tensor([[math.log(2.0)]], requires_grad=True)  # ratio 2, clip at 1.2, good completion
    terms = policy_loss(logprobs, torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), NO_KL, torch.zeros(1, 1))
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(-1.2)
    assert terms.clip_fraction.item() == 1.0
    assert gradient_of(logprobs).item() == 0.0


def test_a_token_past_the_clip_on_the_wrong_side_is_pulled_back():
    logprobs = torch.tensor([[math.log(2.0)]], requires_grad=True)  # ratio 2, but the completion was bad
    terms = policy_loss(logprobs, -torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), NO_KL, torch.zeros(1, 1))
    terms.loss.backward()
    assert terms.loss.item() == pytest.approx(2.0)
    assert terms.clip_fraction.item() == 0.0
    assert gradient_of(logprobs).item() == pytest.approx(2.0)


@pytest.mark.parametrize(
    ("ratio", "advantage", "clipped"),
    [(1.3, 1.0, 1), (1.25, 1.0, 0), (0.5, 1.0, 0), (0.5, -1.0, 1), (0.85, -1.0, 0), (1.3, -1.0, 0), (2.0, 0.0, 0)],
)
def test_a_token_counts_as_clipped_only_in_the_direction_its_advantage_pushes(ratio, advantage, clipped):
    grpo = GRPO(kl_coef=0, clip_high=0.28)
    logprobs, one = torch.tensor([[math.log(ratio)]]), torch.ones(1, 1)
    assert policy_loss(logprobs, one * advantage, one, one, grpo, torch.zeros(1, 1)).clip_fraction.item() == clipped


@pytest.mark.parametrize(
    ("ratio", "advantage", "objective"),
    [(1.5, 1.0, 1.28), (1.25, 1.0, 1.25), (0.5, 1.0, 0.5), (0.5, -1.0, -0.8), (1.5, -1.0, -1.5), (1.0, -2.0, -2.0)],
)
def test_the_objective_by_hand_with_a_higher_upper_clip(ratio, advantage, objective):
    log_ratio = torch.tensor([[math.log(ratio)]])
    result = clipped_objective(log_ratio, log_ratio, torch.tensor([[advantage]]), clip_low=0.2, clip_high=0.28)
    assert result.item() == pytest.approx(objective)


@pytest.mark.parametrize("advantage", [1.5, -0.5, 0.0])
def test_on_policy_the_gradient_of_the_objective_is_the_advantage(advantage):
    logprobs = torch.tensor([[-3.0, -0.1]], requires_grad=True)
    terms = policy_loss(logprobs, torch.tensor([[advantage]]), torch.ones(1, 2), torch.full((1, 1), 0.5), NO_KL)
    (-terms.loss).backward()
    assert terms.loss.item() == -advantage
    assert gradient_of(logprobs).tolist() == [[0.5 * advantage, 0.5 * advantage]]
    assert terms.clip_fraction.item() == 0.0


def test_two_completions_by_hand():
    # lengths 2 and 1, advantages 1 and -2, ratio 1: per sequence -(1 - 2) / 2, per token -(1 + 1 - 2) / 3
    mask, advantages = torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0], [-2.0]])
    by_hand = {"sequence": 0.5, "token": 0.0}
    for reduction, expected in by_hand.items():
        weights = REDUCTIONS[reduction](mask.sum(1))
        loss = policy_loss(torch.zeros(2, 2), advantages, mask, weights, NO_KL).loss
        assert loss.item() == pytest.approx(expected, abs=1e-7)


def test_weights_by_hand():
    lengths = torch.tensor([4, 1, 0])
    assert REDUCTIONS["sequence"](lengths).tolist() == [[pytest.approx(1 / 12)], [pytest.approx(1 / 3)], [0.0]]
    assert REDUCTIONS["token"](lengths).tolist() == [[pytest.approx(0.2)], [pytest.approx(0.2)], [0.0]]


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_a_step_of_empty_completions_has_a_loss_of_zero(reduction):
    weights = REDUCTIONS[reduction](torch.zeros(3, dtype=torch.long))
    terms = policy_loss(torch.zeros(3, 2), torch.ones(3, 1), torch.zeros(3, 2), weights, NO_KL)
    assert terms.loss.item() == 0.0


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("on_policy", [True, False])
def test_whatever_stands_in_the_padding_changes_nothing(garbage, on_policy):
    clean = random_step(3)
    dirty = {name: tensor.clone() for name, tensor in clean.items()}
    for name in ("logprobs", "old_logprobs", "ref_logprobs"):
        dirty[name][clean["completion_mask"] == 0] = garbage
    losses = []
    for step in (clean, dirty):
        step["logprobs"].requires_grad_()
        losses.append(loss_of(step, GRPO(), on_policy=on_policy).loss)
        losses[-1].backward()
    assert torch.equal(losses[0], losses[1])
    assert torch.equal(gradient_of(dirty["logprobs"]), gradient_of(clean["logprobs"]))


def test_equal_rewards_leave_only_the_pull_of_the_kl():
    step = random_step(1)
    step["advantages"] = torch.zeros(5, 1)
    step["logprobs"].requires_grad_()
    terms = loss_of(step, GRPO(kl_coef=0.5), on_policy=True)
    assert terms.policy.item() == 0.0
    assert terms.loss.item() == 0.5 * terms.kl.item() > 0


def test_without_a_kl_coefficient_the_kl_is_measured_but_does_not_train():
    step = random_step(1)
    terms = loss_of(step, NO_KL)
    assert terms.kl.item() > 0
    assert terms.loss.item() == terms.policy.item()


def test_a_kl_coefficient_without_reference_is_an_error_not_a_silent_zero():
    with pytest.raises(SettingsError, match=r"kl_coef is 0.04, which needs ref_logprobs, but none are given"):
        policy_loss(torch.zeros(1, 1), torch.ones(1, 1), torch.ones(1, 1), torch.ones(1, 1), GRPO())


def test_bfloat16_logprobs_are_computed_in_float32():
    logprobs = torch.tensor([[-1.0]], dtype=torch.bfloat16, requires_grad=True)
    terms = policy_loss(logprobs, torch.tensor([[0.123456]]), torch.ones(1, 1), torch.ones(1, 1), NO_KL)
    assert terms.loss.dtype == torch.float32
    assert terms.loss.item() == pytest.approx(-0.123456, rel=1e-6)


def test_k3_by_hand():
    # reference twice as likely: 2 - ln 2 - 1
    kl = k3_kl(torch.tensor([[-1.0, -1.0]]), torch.tensor([[-1.0 + math.log(2.0), -1.0]]))
    assert kl.tolist() == [[pytest.approx(1 - math.log(2.0)), 0.0]]


@settings(deadline=None)
@given(st.floats(-20, 0, width=32), st.floats(-20, 0, width=32))
def test_k3_is_never_negative(logprob, ref_logprob):
    assert k3_kl(torch.tensor([[logprob]]), torch.tensor([[ref_logprob]])).item() >= 0


def test_k3_keeps_its_digits_near_zero():
    # x^2 / 2 for a log-ratio of 1e-4; exp(x) - x - 1 in float32 gives 0 or 1.2e-7 here
    assert k3_kl(torch.zeros(1, 1), torch.full((1, 1), 1e-4)).item() == pytest.approx(5e-9, rel=0.01)


def test_the_mean_of_k3_under_the_policy_is_the_kl_divergence():
    policy = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    reference = torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64)
    mean = (policy * k3_kl(policy.log(), reference.log())).sum()
    assert mean.item() == pytest.approx((policy * (policy / reference).log()).sum().item())
