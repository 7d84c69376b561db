import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.policy.logprobs import token_logprobs


def drawn(rows: int, vocabulary: int, width: int = 8, dtype: torch.dtype = torch.float64, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=generator, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    coefficients = torch.randn(rows, generator=generator, dtype=torch.float64)
    return hidden.to(dtype), weight.to(dtype), targets, coefficients


def oracle(hidden, weight, targets, temperature):
    logprobs = (hidden @ weight.t() / temperature).log_softmax(-1)
    return logprobs.gather(1, targets[:, None]).squeeze(1), -(logprobs.exp() * logprobs).sum(-1)


def gradients(values, coefficients, *leaves):
    return torch.autograd.grad((values * coefficients).sum(), leaves)


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 30),
    vocabulary=st.integers(1, 50),
    chunk=st.integers(1, 40),
    temperature=st.floats(0.3, 3.0),
    seed=st.integers(0, 1000),
)
def test_values_and_gradients_are_those_of_log_softmax_for_any_chunk(rows, vocabulary, chunk, temperature, seed):
    hidden, weight, targets, coefficients = drawn(rows, vocabulary, seed=seed)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=temperature, chunk_rows=chunk)
    expected, expected_entropy = oracle(hidden, weight, targets, temperature)
    torch.testing.assert_close(logprobs, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-12, atol=1e-12)
    both = [
        (logprobs, expected),
        (entropy, expected_entropy),
        (logprobs - 2 * entropy, expected - 2 * expected_entropy),
    ]
    for mine, reference in both:
        ours = torch.autograd.grad((mine * coefficients).sum(), (hidden, weight), retain_graph=True)
        theirs = torch.autograd.grad((reference * coefficients).sum(), (hidden, weight), retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


def test_a_tied_embedding_gets_the_gradient_of_both_its_uses():
    _, weight, targets, coefficients = drawn(6, 10)
    inputs = torch.tensor([3, 1, 4, 1, 5, 9])
    weight.requires_grad_()
    logprobs, _ = token_logprobs(weight[inputs].sin(), weight, targets, chunk_rows=4)
    expected, _ = oracle(weight[inputs].sin(), weight, targets, 1.0)
    torch.testing.assert_close(
        gradients(logprobs, coefficients, weight), gradients(expected, coefficients, weight), rtol=1e-12, atol=1e-12
    )


def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], dtype=torch.float32, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([0, 0]))
    assert logprobs.tolist() == [0.0, -2e4] and entropy.tolist() == [0.0, 0.0]
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == [0.0, 2.0]


@pytest.mark.parametrize("chunk", [7, 2048])
def test_bfloat16_weights_are_summed_over_in_float32(chunk):
    # 300 rows that each give the same small gradient: kept in bfloat16, the sum would stop growing at 256 of them.
    hidden = torch.ones(300, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    logprobs, entropy = token_logprobs(hidden, weight, torch.zeros(300, dtype=torch.long), chunk_rows=chunk)
    assert (logprobs.dtype, entropy.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(logprobs, torch.full((300,), -0.6931472))
    logprobs.sum().backward()
    assert weight.grad is not None and weight.grad.dtype == torch.bfloat16
    assert weight.grad.flatten().tolist() == [150.0, -150.0]  # exact in bfloat16; 128 is where its own sum would stop


def test_bfloat16_is_within_its_rounding_of_float64():
    hidden, weight, targets, coefficients = drawn(200, 40, width=16, dtype=torch.bfloat16)
    weight.requires_grad_()
    logprobs, _ = token_logprobs(hidden, weight, targets, chunk_rows=32)
    (gradient,) = gradients(logprobs, coefficients, weight)
    wide = weight.detach().double().requires_grad_()
    expected, _ = oracle(hidden.double(), wide, targets, 1.0)
    (expected_gradient,) = gradients(expected, coefficients, wide)
    # Logits up to 16 are rounded to 8 bits: off by 2**-5 at most, and so is their logsumexp.
    assert float((logprobs.double() - expected).detach().abs().max()) < 2 * 2**-5
    assert float((gradient.double() - expected_gradient).norm() / expected_gradient.norm()) < 0.01
