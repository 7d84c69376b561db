"""Loss, gradient and advantages against TRL's own code, run on the same tensors. Skips where TRL is not installed.

``_compute_loss`` is called on a stand-in for the trainer that has nothing but the settings it reads; the advantage
code, which is inside a long method there, is cut out of TRL's source and run.
"""

import ast
import inspect
import math
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from medrl.grpo import ALGORITHMS, GRPO, REDUCTIONS, policy_loss

pytest.importorskip("trl", reason="pip install 'medrl[interop]'")
from trl.trainer.grpo_trainer import GRPOTrainer, nanstd
from trl.trainer.rloo_trainer import RLOOTrainer

CASES = 500
MAX_TOKENS = 8

THEIRS: dict[str, tuple[GRPO, dict[str, Any]]] = {
    "paper": (GRPO(algorithm="paper"), {"loss_type": "grpo"}),
    "grpo": (GRPO(), {"loss_type": "grpo"}),
    "grpo, k3 weight 0.5, wide clip": (GRPO(kl_coef=0.5, clip_high=0.5), {"loss_type": "grpo"}),
    "bnpo": (GRPO(reduction="token"), {"loss_type": "bnpo"}),
    "dr_grpo": (GRPO(algorithm="dr_grpo", kl_coef=0.04), {"loss_type": "dr_grpo"}),
    "dapo": (GRPO(algorithm="dapo"), {"loss_type": "dapo"}),
    "dapo with entropy": (GRPO(algorithm="dapo", entropy_coef=0.02), {"loss_type": "dapo"}),
    "gspo": (GRPO(algorithm="gspo"), {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "gspo with KL": (
        GRPO(algorithm="gspo", kl_coef=0.04),
        {"loss_type": "grpo", "importance_sampling_level": "sequence"},
    ),
    "cispo": (GRPO(algorithm="cispo"), {"loss_type": "cispo", "epsilon_high": 5.0}),
}
"""Our settings -> TRL's. CISPO's upper bound is 1 + clip_high here and epsilon_high there."""


def stand_in(settings: GRPO, step: dict[str, torch.Tensor], **changes: Any) -> Any:
    """What ``_compute_loss`` reads of a trainer: on one process, no accumulation, no vLLM."""
    identity = SimpleNamespace(num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x)
    values = {
        "_get_per_token_logps_and_entropies": lambda *_, **__: (step["logprobs"], step["entropy"], None),
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": settings.kl_coef,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "epsilon_low": settings.clip_low,
        "epsilon_high": settings.clip_high,
        "use_vllm": False,
        "vllm_importance_sampling_correction": False,
        "model": SimpleNamespace(training=True),
        "current_gradient_accumulation_steps": 1,
        "max_completion_length": MAX_TOKENS,
        "accelerator": identity,
        "_entropy_bonus_enabled": settings.entropy_coef > 0,
        "use_adaptive_entropy": False,
        "entropy_coef": settings.entropy_coef,
        "_metrics": defaultdict(lambda: defaultdict(list)),
        **changes,
    }
    identity.sync_gradients = True
    return SimpleNamespace(**values)


def as_tensors(step: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    tensors = {name: torch.from_numpy(np.array(array)) for name, array in step.items()}
    tensors["logprobs"].requires_grad_()
    tensors["entropy"].requires_grad_()
    return tensors


def inputs_of(tensors: dict[str, torch.Tensor], on_policy: bool) -> dict[str, Any]:
    mask = tensors["completion_mask"]
    nothing = torch.zeros(len(mask), 0, dtype=torch.long)
    return {
        "prompt_ids": nothing,
        "prompt_mask": nothing,
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask,
        "advantages": tensors["advantages"],
        "old_per_token_logps": None if on_policy else tensors["old_logprobs"],
        "ref_per_token_logps": tensors["ref_logprobs"],
        "num_items_in_batch": mask.sum(),
        "old_logps": (tensors["old_logprobs"] * mask).sum(1),
    }


def our_loss(settings: GRPO, tensors: dict[str, torch.Tensor], on_policy: bool) -> torch.Tensor:
    lengths = tensors["completion_mask"].sum(1)
    return policy_loss(
        tensors["logprobs"], tensors["advantages"][:, None], tensors["completion_mask"],
        REDUCTIONS[settings.reduction](lengths, MAX_TOKENS), settings, None if on_policy else tensors["old_logprobs"],
        tensors["ref_logprobs"], tensors["entropy"], 1 / max(1, int(lengths.sum())),
    ).loss  # fmt: skip


def gradients(loss: torch.Tensor, tensors: dict[str, torch.Tensor]) -> list[np.ndarray]:
    found = torch.autograd.grad(loss, [tensors["logprobs"], tensors["entropy"]], allow_unused=True)
    return [np.zeros(tensors["logprobs"].shape) if g is None else g.numpy() for g in found]


@pytest.mark.parametrize("name", THEIRS)
def test_loss_and_gradient_are_those_of_trl(name, random_steps):
    settings, theirs = THEIRS[name]
    worst = 0.0
    for seed in range(CASES):
        step = random_steps(seed)
        step["advantages"] = settings.row.advantages(step["rewards"].tolist()).numpy().reshape(-1)
        tensors, on_policy = as_tensors(step), name == "paper" or seed % 3 == 0
        trainer = stand_in(settings, tensors, **theirs)
        expected = GRPOTrainer._compute_loss(trainer, None, inputs_of(tensors, on_policy))
        expected_gradients = gradients(expected, tensors)
        loss = our_loss(settings, tensors, on_policy)
        worst = max(worst, abs(loss.item() - expected.item()))
        for ours, reference in zip(gradients(loss, tensors), expected_gradients, strict=True):
            worst = max(worst, np.abs(ours - reference).max())
    assert worst < 1e-6, worst


def test_the_kl_is_trl_s(random_steps):
    settings = GRPO(kl_coef=1.0)
    for seed in range(CASES):
        step = random_steps(seed, shortest=1)
        step["advantages"] = np.zeros(len(step["logprobs"]))
        tensors = as_tensors(step)
        trainer = stand_in(settings, tensors, loss_type="bnpo")
        GRPOTrainer._compute_loss(trainer, None, inputs_of(tensors, False))
        (theirs,) = trainer._metrics["train"]["kl"]
        weights = REDUCTIONS["token"](tensors["completion_mask"].sum(1))
        ours = policy_loss(
            tensors["logprobs"], tensors["advantages"][:, None], tensors["completion_mask"], weights, settings,
            tensors["old_logprobs"], tensors["ref_logprobs"],
        ).kl.item()  # fmt: skip
        assert ours == pytest.approx(theirs, abs=1e-9)


def test_rloo_is_trl_s(random_steps):
    settings = GRPO(algorithm="rloo", kl_coef=0.0)
    for seed in range(CASES):
        step = random_steps(seed, shortest=1)  # without a token TRL still counts a constant
        step["advantages"] = settings.row.advantages(step["rewards"].tolist()).numpy().reshape(-1)
        tensors = as_tensors(step)
        expected = RLOOTrainer._compute_loss(stand_in(settings, tensors), None, inputs_of(tensors, False))
        expected_gradients = gradients(expected, tensors)
        loss = our_loss(settings, tensors, on_policy=False)
        assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
        for ours, reference in zip(gradients(loss, tensors), expected_gradients, strict=True):
            np.testing.assert_allclose(ours, reference, atol=1e-6)


# ---------------------------------------------------------------- advantages, cut out of TRL's source


def statements(function: Any, first: str, last: str) -> Any:
    """The compiled statements of a function from the one that begins with ``first`` to the one that begins with
    ``last``."""
    body = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0].body  # type: ignore[attr-defined]
    texts = [ast.unparse(statement) for statement in body]
    start = next(i for i, text in enumerate(texts) if text.startswith(first))
    end = next(i for i, text in enumerate(texts) if i >= start and text.startswith(last))
    module = ast.Module(body=body[start : end + 1], type_ignores=[])
    return compile(module, "trl", "exec")


def run(code: Any, rewards: np.ndarray, **trainer: Any) -> np.ndarray:
    flat = torch.from_numpy(rewards.reshape(-1))
    names: dict[str, Any] = {
        "self": SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize",
            reward_weights=torch.ones(1, dtype=torch.float64),
            **trainer,
        ),
        "rewards": flat.clone(),
        "rewards_per_func": flat[:, None],
        "unscorable_mask": torch.zeros(len(flat), dtype=torch.bool),
        "num_generations": rewards.shape[1],
        "device": "cpu",
        "torch": torch,
        "nanstd": nanstd,
        "math": math,
    }
    exec(code, names)  # noqa: S102  TRL's own statements, from the installed package
    return names["advantages"].numpy().reshape(rewards.shape)


SCALES = {"paper": "group", "grpo": "group", "dapo": "group", "gspo": "group", "cispo": "group", "dr_grpo": "none"}


@pytest.mark.parametrize(("name", "scale"), SCALES.items())
def test_advantages_are_those_of_trl(name, scale, random_steps):
    code = statements(
        GRPOTrainer._generate_and_score_completions,
        "if self.multi_objective_aggregation",
        "advantages = torch.nan_to_num",
    )
    for seed in range(CASES):
        rewards = random_steps(seed)["rewards"]
        theirs = run(code, rewards, scale_rewards=scale)
        ours = ALGORITHMS[name].advantages(rewards.tolist()).numpy()
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_leave_one_out_advantages_are_those_of_trl(random_steps):
    code = statements(RLOOTrainer._generate_and_score_completions, "grouped_rewards =", "advantages = torch.nan_to_num")
    for seed in range(CASES):
        rewards = random_steps(seed)["rewards"]
        theirs = run(code, rewards, normalize_advantages=False)
        np.testing.assert_allclose(ALGORITHMS["rloo"].advantages(rewards.tolist()).numpy(), theirs, atol=1e-6)
