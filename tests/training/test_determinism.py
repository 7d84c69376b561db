"""Same recipe, same bits; and what may not change them."""

import os
import random

import numpy as np
import pytest
import torch

from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.rollout import scheduler
from medrl.training import ahead
from medrl.training.determinism import CUBLAS, deterministic_kernels, random_state, seed_everything, set_random_state
from medrl.training.train import train

OBJECTIVE = GRPO(group_size=2, kl_coef=0.04)


def dice() -> tuple:
    return random.random(), random.gauss(), np.random.random(), np.random.standard_normal(), float(torch.rand(()))  # noqa: NPY002


def test_generators_go_on_from_where_they_were_also_between_two_gauss_draws():
    seed_everything(4)
    dice()  # half of each pair of normal numbers is now in store
    state = random_state()
    expected = [dice() for _ in range(3)]
    seed_everything(5)
    assert dice() != expected[0]
    set_random_state(state)
    assert [dice() for _ in range(3)] == expected


def test_the_seed_sets_all_of_them_and_may_be_large():
    seen = []
    for seed in (2**40 + 1, 2**40 + 1, 3):
        seed_everything(seed)
        seen.append(dice())
    assert seen[0] == seen[1] and not set(seen[0]) & set(seen[2])


def test_deterministic_kernels_are_asked_for_and_given_back(monkeypatch):
    monkeypatch.setenv(CUBLAS, "")
    monkeypatch.delenv(CUBLAS)
    before = torch.are_deterministic_algorithms_enabled()
    with deterministic_kernels(False):
        assert torch.are_deterministic_algorithms_enabled() == before
    with deterministic_kernels(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ[CUBLAS] == ":4096:8"
    assert torch.are_deterministic_algorithms_enabled() == before


def trained(model_folder, examples, lively, small, out, **options) -> tuple[bytes, str]:
    policy = Policy.load(model_folder)
    settings = small.model_copy(update={"steps": 3, **options})
    run = train(policy, examples, lively, OBJECTIVE, out=out, settings=settings, quiet=True)
    return (run.path / "rollouts.jsonl").read_bytes(), policy.fingerprint()


def test_neither_the_setting_nor_the_number_of_workers_changes_a_bit_on_a_cpu(
    model_folder, examples, lively, small, tmp_path, monkeypatch
):
    plain = trained(model_folder, examples, lively, small, tmp_path / "plain")
    assert trained(model_folder, examples, lively, small, tmp_path / "asked", deterministic=True) == plain
    monkeypatch.setattr(ahead.Ahead.__init__, "__defaults__", (1, ahead.LIMIT_S))
    assert trained(model_folder, examples, lively, small, tmp_path / "alone") == plain


# ---------------------------------------------------------------- memory


@pytest.fixture
def start(make_policy, tmp_path_factory):
    """A float64 policy on disk: what differs only by rounding then differs by nothing that matters."""
    folder = tmp_path_factory.mktemp("policies") / "exact"
    make_policy().save(folder)
    return folder


def exhausted(inner, nth: int, calls: list):
    def failing(*arguments, **options):
        calls.append(1)
        if len(calls) == nth:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return inner(*arguments, **options)

    return failing


@pytest.mark.parametrize(
    ("owner", "name", "nth"),
    [
        (scheduler, "prefill", 1),
        (scheduler.Decoder, "step", 3),
        (Policy, "logprobs", 1),  # the policy's forward pass
        (Policy, "logprobs", 2),  # the reference's
        (torch.Tensor, "backward", 1),
    ],
)
def test_running_out_of_memory_anywhere_changes_the_update_by_rounding_only(
    start, examples, lively, small, tmp_path, owner, name, nth
):
    settings = small.model_copy(update={"steps": 1})
    weights = []
    for fails in (False, True):
        policy, calls = Policy.load(start, dtype="float64"), []
        with pytest.MonkeyPatch.context() as patch:
            if fails:
                patch.setattr(owner, name, exhausted(getattr(owner, name), nth, calls))
            run = train(policy, examples, lively, OBJECTIVE, out=tmp_path / str(fails), settings=settings, quiet=True)
        assert len(calls) > nth or not fails
        weights.append((dict(policy.model.named_parameters()), (run.path / "rollouts.jsonl").read_text()))
    (ours, our_rows), (theirs, their_rows) = weights
    assert [row.split('"entropy"')[0] for row in our_rows.splitlines()] == [
        row.split('"entropy"')[0] for row in their_rows.splitlines()
    ]
    for parameter in ours:
        assert torch.allclose(ours[parameter], theirs[parameter], rtol=0, atol=1e-5), parameter


def test_completions_that_do_not_fit_alone_are_named_with_what_would_help(
    start, examples, lively, small, tmp_path, monkeypatch
):
    from medrl.errors import PolicyError

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(scheduler, "prefill", full)
    with pytest.raises(PolicyError, match=r"too small for 2 completions of example example-\d alone .*max_new_tokens"):
        train(Policy.load(start), examples, lively, OBJECTIVE, out=tmp_path / "run", settings=small, quiet=True)
