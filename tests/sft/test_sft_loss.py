import math

import pytest
import torch

from medrl.grpo import REDUCTIONS
from medrl.sft import cross_entropy


def gradient_of(tensor: torch.Tensor) -> torch.Tensor:
    assert tensor.grad is not None
    return tensor.grad


def test_two_answers_by_hand():
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-6.0, -9.0, -9.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss = {name: cross_entropy(logprobs, mask, weights(mask.sum(1), 3)).item() for name, weights in REDUCTIONS.items()}
    by_hand = {"token": 9 / 3, "sequence": (1.5 + 6) / 2, "constant": 9 / (2 * 3)}
    assert loss == {name: pytest.approx(value) for name, value in by_hand.items()}


def test_it_is_the_cross_entropy_of_torch_over_the_answer_tokens():
    torch.manual_seed(0)
    logits, targets = torch.randn(3, 5, 11, dtype=torch.float64), torch.randint(11, (3, 5))
    mask = torch.tensor([[0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    logprobs = logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    expected = torch.nn.functional.cross_entropy(logits[mask.bool()], targets[mask.bool()])
    loss = cross_entropy(logprobs, mask, REDUCTIONS["token"](mask.sum(1)))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("garbage", [math.nan, -math.inf])
def test_only_answer_tokens_have_a_gradient_whatever_stands_beside_them(garbage):
    logprobs = torch.tensor([[garbage, -1.0, -2.0, garbage]], requires_grad=True)
    mask = torch.tensor([[0, 1, 1, 0]])
    loss = cross_entropy(logprobs, mask, REDUCTIONS["token"](mask.sum(1)))
    loss.backward()
    assert loss.item() == 1.5
    assert gradient_of(logprobs).tolist() == [[0.0, -0.5, -0.5, 0.0]]


@pytest.mark.parametrize("reduction", ["sequence", "token"])
def test_the_shares_of_micro_batches_add_up(reduction):
    logprobs = torch.tensor([[-1.0, -2.0], [-3.0, 0.0], [-4.0, -5.0]])
    mask = torch.tensor([[1, 1], [1, 0], [0, 1]])
    weights = REDUCTIONS[reduction](mask.sum(1))
    shares = [cross_entropy(logprobs[i : i + 1], mask[i : i + 1], weights[i : i + 1]).item() for i in range(3)]
    assert sum(shares) == pytest.approx(cross_entropy(logprobs, mask, weights).item())
