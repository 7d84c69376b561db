"""Each algorithm, through the real loop, teaches a tiny policy a toy task: write even tokens."""

import copy

import pytest
import torch

from medrl.grpo import ALGORITHMS, GRPO
from medrl.policy.policy import Policy
from medrl.policy.tiny import build_model
from medrl.rollout.sampling import Sampling
from medrl.sft import RFT
from medrl.training.optim import Optim
from medrl.training.train import train
from medrl.types import Score

STEPS = 40
OBJECTIVES = {
    **{name: GRPO(algorithm=name, group_size=8) for name in ALGORITHMS},
    "grpo, three updates": GRPO(group_size=8, updates_per_rollout=3, kl_coef=0),
    "grpo, entropy bonus": GRPO(group_size=8, entropy_coef=0.01, kl_coef=0),
    "grpo, balanced": GRPO(group_size=8, balance="modality", kl_coef=0),
    "grpo, moving reference": GRPO(group_size=8, sync_reference_every=5),
    "rft": RFT(group_size=8),
}


@pytest.fixture
def toy(processor) -> Policy:
    model = build_model(
        processor, hidden=32, layers=1, intermediate=48, vision_hidden=32, vision_layers=1, context_tokens=256
    )
    policy = Policy(model.eval(), copy.deepcopy(processor))
    policy.freeze_reference()
    return policy


def even(example, completion):
    if not completion.token_ids:  # the check of right answers
        return Score(value=float(example.target in completion.text), answer=example.target)
    share = sum(token % 2 == 0 for token in completion.token_ids) / len(completion.token_ids)
    return Score(value=share, parts={"even": share}, answer=example.target if share == 1 else None)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_it_passes_nine_tenths_of_the_reward_in_forty_steps(name, toy, examples, tmp_path):
    run = train(
        toy, examples[:4], even, OBJECTIVES[name], out=tmp_path / "run", quiet=True, steps=STEPS, prompts_per_step=4,
        template="plain", sampling=Sampling(max_new_tokens=4), optim=Optim(lr=0.02), save_every=STEPS,
    )  # fmt: skip
    rewards = [row["rewards/even/mean"] for row in run.metrics()]
    assert len(rewards) == STEPS
    assert sum(rewards[:3]) / 3 < 0.65  # about half of all tokens are even
    assert sum(rewards[-5:]) / 5 > 0.9
    assert all(torch.isfinite(parameter).all() for parameter in toy.model.parameters())
