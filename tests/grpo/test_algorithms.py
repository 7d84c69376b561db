"""Every row of the table against its paper's formulas in float64, and where mathematics has corners."""

import math

import numpy as np
import paper_formulas
import pytest
import torch

from medrl.errors import SettingsError
from medrl.grpo import ALGORITHMS, GRPO, REDUCTIONS, overlong_penalty, policy_loss
from medrl.grpo.advantages import MEAN_REWARD_FLOOR, balance_advantages, domain_scales
from medrl.grpo.kl import k1_kl, k2_kl, k3_kl

NAMES = list(ALGORITHMS)
every_algorithm = pytest.mark.parametrize("name", NAMES)
MAX_TOKENS = 8
CASES = 500


def settings_for(name: str, seed: int) -> GRPO:
    """The algorithm's own settings, with and without its KL and an entropy bonus."""
    random = np.random.default_rng(seed)
    return GRPO(
        algorithm=name,  # type: ignore[arg-type]
        kl_coef=float(random.choice([0.0, 0.04, 0.5])),
        entropy_coef=float(random.choice([0.0, 0.01])),
    )


def tensors(step: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in step.items()}


def our_loss(name: str, step: dict[str, np.ndarray], settings: GRPO):
    t = tensors(step)
    t["logprobs"].requires_grad_()
    t["entropy"].requires_grad_()
    lengths = t["completion_mask"].sum(1)
    terms = policy_loss(
        t["logprobs"], t["advantages"][:, None], t["completion_mask"],
        REDUCTIONS[settings.reduction](lengths, MAX_TOKENS), settings,
        None if name == "paper" else t["old_logprobs"], t["ref_logprobs"], t["entropy"], 1 / max(1, int(lengths.sum())),
    )  # fmt: skip
    terms.loss.backward()
    assert t["logprobs"].grad is not None
    return terms, t["logprobs"].grad.numpy(), t["entropy"].grad


@every_algorithm
def test_advantages_loss_kl_and_gradient_are_those_of_the_paper(name, random_steps):
    row = ALGORITHMS[name]
    worst = 0.0
    for seed in range(CASES):
        step, settings = random_steps(seed), settings_for(name, seed)
        expected_advantages = paper_formulas.advantages(name, step["rewards"])
        advantages = row.advantages(step["rewards"].tolist()).numpy()
        np.testing.assert_allclose(advantages, expected_advantages, rtol=0, atol=1e-9)
        step["advantages"] = advantages.reshape(-1)

        terms, gradient, entropy_gradient = our_loss(name, step, settings)
        expected, expected_gradient = paper_formulas.loss(name, step, settings, MAX_TOKENS)
        worst = max(worst, abs(terms.loss.item() - expected), np.abs(gradient - expected_gradient).max())

        mask = step["completion_mask"]
        kl = [
            [paper_formulas.kl(name, lp, ref) if counts else 0.0 for lp, ref, counts in zip(*rows, strict=True)]
            for rows in zip(step["logprobs"], step["ref_logprobs"], mask, strict=True)
        ]
        worst = max(worst, np.abs(terms.kl_per_token.numpy() - np.array(kl)).max())
        if settings.entropy_coef:
            assert entropy_gradient is not None
            share = -settings.entropy_coef / max(1, mask.sum())
            np.testing.assert_allclose(entropy_gradient.numpy(), share * mask, atol=1e-12)
    assert worst < 1e-9


# ---------------------------------------------------------------- corners


@every_algorithm
@pytest.mark.parametrize("size", [2, 8, 23])
def test_a_step_of_equal_rewards_has_exactly_no_advantage(name, size):
    assert ALGORITHMS[name].advantages([[1.2] * size, [1.0 + 0.2] * size]).abs().max().item() == 0.0
    assert ALGORITHMS[name].advantages(torch.full((3, size), 1.2)).abs().max().item() == 0.0


@every_algorithm
def test_a_group_of_equal_rewards_among_others_has_exactly_no_advantage_but_against_the_step(name):
    advantages = ALGORITHMS[name].advantages([[1.2] * 4, [0.0, 0.0, 1.0, 2.0]])
    assert advantages[1].abs().min() > 0
    if name == "reinforce++":  # compares with the whole step: a group that is right throughout is better than it
        assert (advantages[0] > 0).all()
    else:
        assert advantages[0].tolist() == [0.0] * 4


def one_token(name: str, log_ratio: float, advantage: float) -> tuple[float, float]:
    """Loss and gradient of a single token, on top of an old log-probability of -1."""
    logprobs = torch.tensor([[-1.0 + log_ratio]], dtype=torch.float64, requires_grad=True)
    settings = GRPO(algorithm=name, kl_coef=0.0)  # type: ignore[arg-type]
    weights = REDUCTIONS[settings.reduction](torch.tensor([1]), 1)
    old = torch.tensor([[-1.0]], dtype=torch.float64)
    terms = policy_loss(logprobs, torch.tensor([[advantage]]), torch.ones(1, 1), weights, settings, old)
    terms.loss.backward()
    assert logprobs.grad is not None
    return terms.loss.item(), logprobs.grad.item()


@every_algorithm
def test_one_token_at_a_ratio_of_one_has_the_gradient_of_advantage_times_log_probability(name):
    value, gradient = one_token(name, 0.0, 1.5)
    assert gradient == -1.5
    assert value == (1.5 if name == "cispo" else -1.5)  # CISPO's objective is A log pi, and log pi is -1


@every_algorithm
@pytest.mark.parametrize("overflow", [800.0, math.inf])
def test_an_infinite_ratio_is_clipped_where_the_formula_clips_it_and_loud_where_it_does_not(name, overflow):
    settings = GRPO(algorithm=name, kl_coef=0.0)  # type: ignore[arg-type]
    logprobs = torch.tensor([[-1.0]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[-1.0 - overflow]], dtype=torch.float64)
    weights = REDUCTIONS[settings.reduction](torch.tensor([1]), 1)
    for advantage in (2.0, 0.0, -2.0):
        logprobs.grad = None
        terms = policy_loss(logprobs, torch.tensor([[advantage]]), torch.ones(1, 1), weights, settings, old)
        terms.loss.backward()
        assert logprobs.grad is not None
        loss, gradient = terms.loss.item(), logprobs.grad.item()
        if name == "paper":
            assert (loss, gradient) == (-advantage, -advantage)
        elif name == "cispo":  # the weight is 1 + clip_high
            assert (loss, gradient) == (pytest.approx(5 * advantage), pytest.approx(-5 * advantage))
        elif advantage >= 0:
            assert (loss, gradient) == (pytest.approx(-(1 + settings.clip_high) * advantage), 0.0)
        else:
            assert loss == math.inf  # an update with it is refused, and the example named


@every_algorithm
def test_a_ratio_of_zero_is_finite(name):
    for advantage in (1.0, -1.0):
        value, gradient = one_token(name, -800.0, advantage)
        assert math.isfinite(value) and math.isfinite(gradient)


@every_algorithm
@pytest.mark.parametrize("on_policy", [True, False])
def test_an_all_masked_step_and_one_of_length_zero_have_no_loss_and_no_gradient(name, on_policy):
    settings = GRPO(algorithm=name, kl_coef=0.04, entropy_coef=0.1)  # type: ignore[arg-type]
    logprobs = torch.full((3, 4), math.nan, requires_grad=True)
    mask = torch.zeros(3, 4)
    weights = REDUCTIONS[settings.reduction](mask.sum(1), 4)
    other = torch.full((3, 4), math.inf)
    terms = policy_loss(
        logprobs, torch.ones(3, 1), mask, weights, settings, None if on_policy else other, other, other, 1.0
    )
    terms.loss.backward()
    assert terms.loss.item() == 0.0 and terms.kl.item() == 0.0 and terms.clip_fraction.item() == 0.0
    assert logprobs.grad is not None and logprobs.grad.abs().max().item() == 0.0


@every_algorithm
def test_a_completion_without_tokens_changes_no_other_s_gradient_but_its_share(name, random_steps):
    step, settings = random_steps(11, shortest=1), GRPO(algorithm=name, kl_coef=0.0)  # type: ignore[arg-type]
    step["advantages"] = np.linspace(-1, 1, len(step["logprobs"]))
    _, whole, _ = our_loss(name, step, settings)
    wider = {key: np.concatenate([value, value[:1]]) for key, value in step.items() if key != "rewards"}
    wider["completion_mask"][-1] = 0.0
    _, gradient, _ = our_loss(name, wider, settings)
    rows = len(whole)
    share = 1.0 if settings.reduction == "token" else rows / (rows + 1)
    np.testing.assert_allclose(gradient[:-1], share * whole, atol=1e-12)
    assert np.abs(gradient[-1]).max() == 0.0


def test_with_one_update_paper_and_grpo_are_the_same(random_steps):
    for seed in range(50):
        step = random_steps(seed)
        step["advantages"] = ALGORITHMS["paper"].advantages(step["rewards"].tolist()).numpy().reshape(-1)
        step["old_logprobs"] = step["logprobs"].copy()
        paper, paper_gradient, _ = our_loss("paper", step, GRPO(algorithm="paper"))
        grpo, gradient, _ = our_loss("grpo", step, GRPO())
        assert paper.loss.item() == pytest.approx(grpo.loss.item(), abs=1e-12)
        np.testing.assert_allclose(gradient, paper_gradient, atol=1e-12)


# ---------------------------------------------------------------- settings


def test_an_algorithm_brings_its_own_settings_and_what_is_given_goes_before_them():
    dapo = GRPO(algorithm="dapo")
    assert (dapo.clip_low, dapo.clip_high, dapo.reduction, dapo.kl_coef) == (0.2, 0.28, "token", 0.0)
    assert dapo.dynamic_sampling > 1 and dapo.overlong_share == 0.2
    assert GRPO(algorithm="dapo", clip_high=0.3, dynamic_sampling=0).clip_high == 0.3
    assert GRPO(**GRPO(algorithm="gspo").model_dump()) == GRPO(algorithm="gspo")
    assert (GRPO(algorithm="paper").group_size, GRPO().group_size) == (4, 8)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"algorithm": "paper", "updates_per_rollout": 2}, "on-policy and has no clip: use 'grpo'"),
        ({"algorithm": "gspo", "reduction": "token"}, "one ratio per completion: set reduction to 'sequence'"),
        ({"algorithm": "ppo"}, "algorithm is the text 'ppo', but it must be 'paper', 'grpo', 'dr_grpo'"),
        ({"sync_reference_every": 10, "kl_coef": 0}, "kl_coef is 0, which loads none"),
        ({"overlong_share": 1.5}, "a share is at least 0 and at most 1"),
        ({"entropy_coef": -0.1}, "at least 0"),
    ],
)
def test_settings_that_contradict_the_algorithm_are_refused(values, words):
    with pytest.raises(SettingsError, match=words.replace("(", r"\(")):
        GRPO(**values)


def test_a_constant_reduction_needs_the_longest_allowed_length():
    with pytest.raises(SettingsError, match="give max_tokens"):
        REDUCTIONS["constant"](torch.tensor([3, 2]))
    assert REDUCTIONS["constant"](torch.tensor([3, 0]), 10).tolist() == [[0.05], [0.0]]


# ---------------------------------------------------------------- around the table


def test_the_overlong_penalty_by_hand():
    # limit 20, buffer 4: free up to 16, then a quarter per token
    lengths = torch.tensor([0, 16, 17, 18, 20, 25])
    assert overlong_penalty(lengths, 20, 4).tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]


def test_domain_scales_by_hand_and_their_floor():
    scales = domain_scales([100, 4, 4], [0.5, 0.5, 0.0])
    assert scales.tolist() == [5.0, 1.0, 2 * MEAN_REWARD_FLOOR]


def test_balanced_advantages_are_louder_for_the_rare_and_the_hard_and_zero_stays_zero():
    advantages = torch.tensor([[1.0, -1.0], [1.0, -1.0], [0.0, 0.0]], dtype=torch.float64)
    balanced = balance_advantages(advantages, domain_scales([100, 4, 4], [0.5, 0.5, 0.5]))
    assert balanced[1, 0] / balanced[0, 0] == pytest.approx(5.0)
    assert balanced.std().item() == pytest.approx(1.0, abs=1e-3)
    assert balanced[2].tolist() == [0.0, 0.0]
    assert balance_advantages(torch.zeros(2, 3), torch.ones(2)).abs().max().item() == 0.0


def test_the_three_kl_estimators_by_hand():
    lp, ref = torch.tensor([[-1.0]], dtype=torch.float64), torch.tensor([[-1.5]], dtype=torch.float64)
    assert k1_kl(lp, ref).item() == 0.5
    assert k2_kl(lp, ref).item() == 0.125
    assert k3_kl(lp, ref).item() == pytest.approx(math.exp(-0.5) + 0.5 - 1)


def test_on_policy_the_gradient_of_k2_is_that_of_the_divergence():
    logits = torch.tensor([0.3, -0.2, 0.9], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64).log()
    policy = logits.log_softmax(0)
    divergence = (policy.exp() * (policy - reference)).sum()
    (expected,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    mean_k2 = (policy.exp().detach() * k2_kl(policy, reference)).sum()
    (found,) = torch.autograd.grad(mean_k2, logits)
    torch.testing.assert_close(found, expected)
