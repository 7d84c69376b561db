"""What a small run needs: a model folder, questions, and a reward that costs nothing."""

import pytest
import torch

from medrl.rollout.sampling import Sampling
from medrl.training.optim import Optim
from medrl.training.train import Training
from medrl.types import Score


@pytest.fixture(scope="session")
def model_folder(make_policy, tmp_path_factory):
    """A float32 policy on disk, as a recipe names one."""
    folder = tmp_path_factory.mktemp("policies") / "tiny"
    make_policy(torch.float32).save(folder)
    return folder


@pytest.fixture(scope="session")
def examples(make_examples, tmp_path_factory):
    return make_examples(tmp_path_factory.mktemp("images"), 7)


@pytest.fixture(scope="session")
def small():
    """Five steps of two groups of two, saved after steps 2, 4 and 5."""
    return Training(
        steps=5,
        prompts_per_step=2,
        mode="no_think",
        template="plain-no-think",
        sampling=Sampling(max_new_tokens=6),
        optim=Optim(lr=1e-3),
        save_every=2,
        seed=3,
    )


def _lively(example, completion):
    right = f"<answer>{example.target}</answer>" in completion.text
    noise = sum(completion.token_ids) % 7 / 7
    return Score(value=float(right) + noise * 0.5, parts={"noise": noise}, answer=example.target if right else None)


@pytest.fixture(scope="session")
def lively():
    """A reward that tells completions of random tokens apart, and knows the right answer."""
    return _lively
