"""Tokens that another program drew: truncated importance sampling against the formula in plain Python."""

import math

import pytest
import torch

from medrl.errors import SettingsError
from medrl.grpo import GRPO, REDUCTIONS, policy_loss, sampling_weights


def step_of(random_steps, seed):
    return {name: torch.from_numpy(array) for name, array in random_steps(seed, shortest=1).items()}


def loss_of(step, grpo, sampling=None, old=None):
    logprobs = step["logprobs"].clone().requires_grad_()
    advantages = (step["rewards"] - step["rewards"].mean(1, keepdims=True)).reshape(-1, 1)
    mask = step["completion_mask"]
    terms = policy_loss(
        logprobs, advantages, mask, REDUCTIONS[grpo.reduction](mask.sum(1)), grpo,
        old_logprobs=old, ref_logprobs=step["ref_logprobs"], sampling_logprobs=sampling,
    )  # fmt: skip
    terms.loss.backward()
    return terms, logprobs.grad


def by_hand(step, grpo, sampling, old):
    """Loss and gradient token by token: min(pi_old / mu, cap) times the clipped objective, the KL as it is."""
    mask, loss = step["completion_mask"].numpy(), 0.0
    gradient = torch.zeros_like(step["logprobs"])
    advantages = (step["rewards"] - step["rewards"].mean(1, keepdims=True)).reshape(-1).tolist()
    for i in range(len(mask)):
        for t in mask[i].nonzero()[0]:
            lp, ref, mu = (float(tensor[i, t]) for tensor in (step["logprobs"], step["ref_logprobs"], sampling))
            before, advantage = float(old[i, t]), advantages[i]
            counts = min(math.exp(before - mu), grpo.sampling_cap)
            ratio = math.exp(lp - before)
            clipped = min(max(ratio, 1 - grpo.clip_low), 1 + grpo.clip_high)
            slope = ratio * advantage if ratio * advantage <= clipped * advantage else 0.0
            kl = math.exp(ref - lp) - (ref - lp) - 1
            weight = 1 / (len(mask) * mask[i].sum())
            loss += weight * (-counts * min(ratio * advantage, clipped * advantage) + grpo.kl_coef * kl)
            gradient[i, t] = weight * (-counts * slope + grpo.kl_coef * (1 - math.exp(ref - lp)))
    return loss, gradient


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("first", [True, False])
def test_loss_and_gradient_are_those_of_the_formula(seed, first, random_steps):
    step, grpo = step_of(random_steps, seed), GRPO(sampling_cap=1.3)
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(step["logprobs"].shape, generator=generator, dtype=torch.float64)
    sampling = step["old_logprobs"] + 0.4 * noise
    old = step["logprobs"] if first else step["old_logprobs"]
    terms, gradient = loss_of(step, grpo, sampling, None if first else old)
    loss, slope = by_hand(step, grpo, sampling, old)
    assert float(terms.loss.detach()) == pytest.approx(loss, abs=1e-12)
    assert torch.allclose(gradient, slope, atol=1e-12)
    beyond = (old - sampling > math.log(1.3)).double() * step["completion_mask"]
    assert torch.equal(terms.sampling_capped * step["completion_mask"], beyond)
    assert torch.equal(terms.sampling_weight == 0, step["completion_mask"] == 0)


def test_a_sampler_that_agrees_changes_nothing(random_steps):
    for algorithm in ("paper", "grpo", "gspo", "rloo", "cispo", "dapo"):
        step, grpo = step_of(random_steps, 3), GRPO(algorithm=algorithm)
        plain, gradient = loss_of(step, grpo)
        terms, corrected = loss_of(step, grpo, step["logprobs"].clone())
        assert torch.equal(terms.loss, plain.loss) and torch.equal(gradient, corrected)
        assert plain.sampling_weight is None


def test_the_weight_is_cut_off_at_the_cap_and_only_above():
    old, sampled = torch.tensor([[-1.0, -2.0, -1.0]]), torch.tensor([[-1.5, -1.0, -9999.0]])
    assert sampling_weights(old, sampled, 1.5).tolist()[0] == pytest.approx([1.5, math.exp(-1), 1.5])
    assert sampling_weights(old, sampled, 2.0).tolist()[0] == pytest.approx([math.exp(0.5), math.exp(-1), 2.0])


def test_a_cap_below_one_is_refused():
    with pytest.raises(SettingsError, match=r"sampling_cap is 0.5, but it must be at least 1"):
        GRPO(sampling_cap=0.5)
