import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TopKLogitsWarper, TopPLogitsWarper

from medrl.errors import SettingsError
from medrl.rollout.sampling import Sampling, draw_tokens, keep_likely, uniforms

# Eighths, so that every sum below is exact: tokens 0..4 own [0, 1/8), [1/8, 3/8), nothing, [3/8, 7/8), [7/8, 1).
EIGHTHS = (1, 2, 0, 4, 1)
ALMOST_ONE = math.nextafter(1.0, 0.0)


def log_of(shares) -> torch.Tensor:
    return torch.tensor([shares], dtype=torch.float64).log()


def drawn(logits: torch.Tensor, uniform: list[float], **options) -> list[int]:
    rows = logits.expand(len(uniform), -1)
    return draw_tokens(rows, torch.tensor(uniform, dtype=torch.float64), Sampling(**options))[0].tolist()


def kept(shares, **options) -> list[int]:
    return keep_likely(log_of(shares).log_softmax(-1), Sampling(**options)).isfinite()[0].nonzero().flatten().tolist()


def test_the_inverse_of_a_known_distribution_is_exact():
    middles = [(i + 0.5) / 8 for i in range(8)]
    assert drawn(log_of(EIGHTHS), middles) == [0, 1, 1, 3, 3, 3, 3, 4]


def test_draws_follow_the_distribution_as_closely_as_an_even_grid_can():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 30, generator=generator, dtype=torch.float64) * 2
    n = 4000
    counts = np.bincount(drawn(logits, [(i + 0.5) / n for i in range(n)], temperature=0.7), minlength=30)
    expected = (logits[0] / 0.7).softmax(-1).numpy() * n
    # Each token owns one interval, so its count is off by less than one at either end.
    assert np.abs(counts - expected).max() < 1.01


def test_random_draws_pass_a_chi_square_test():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 8, generator=generator, dtype=torch.float64)
    n = 5000
    uniform = uniforms(0, 0, "p", 0, n).tolist()
    counts = np.bincount(drawn(logits, uniform), minlength=8)
    expected = logits[0].softmax(-1).numpy() * n
    # 7 degrees of freedom: 24.3 is exceeded once in a thousand times, and the draw is fixed.
    assert ((counts - expected) ** 2 / expected).sum() < 24.3


@settings(deadline=None, max_examples=60)
@given(
    logits=st.lists(st.one_of(st.floats(-30, 30), st.just(-math.inf)), min_size=2, max_size=12),
    uniform=st.one_of(st.sampled_from([0.0, ALMOST_ONE, 0.5]), st.floats(0, ALMOST_ONE)),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_p=st.sampled_from([0.2, 0.9, 1.0]),
    top_k=st.sampled_from([0, 1, 3]),
)
def test_no_uniform_ever_picks_an_impossible_token(logits, uniform, temperature, top_p, top_k):
    rows = torch.tensor([logits], dtype=torch.float32)
    if not rows.isfinite().any():
        return
    sampling = Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    (token,), (logprob,) = draw_tokens(rows, torch.tensor([uniform], dtype=torch.float64), sampling)
    possible = keep_likely(rows / temperature, sampling).isfinite()
    assert possible[0, token]
    assert logprob == pytest.approx(float((rows / temperature).log_softmax(-1)[0, token]), abs=1e-4)


@pytest.mark.parametrize("uniform", [0.0, ALMOST_ONE])
def test_the_ends_of_the_unit_interval_pick_the_first_and_last_possible_token(uniform):
    logits = torch.full((1, 1000), -math.inf)
    logits[0, 10:990] = 0.0
    assert drawn(logits, [uniform]) == [10 if uniform == 0 else 989]


def test_greedy_takes_the_most_likely_token_whatever_the_uniform():
    assert drawn(log_of(EIGHTHS), [0.0, 0.5, ALMOST_ONE], temperature=0) == [3, 3, 3]
    assert drawn(log_of(EIGHTHS), [0.0, 0.5, ALMOST_ONE], top_k=1) == [3, 3, 3]


def test_the_logprob_is_that_of_the_temperature_alone():
    sampling = Sampling(temperature=2.0, top_k=1)
    _, logprobs = draw_tokens(log_of((1, 4)), torch.tensor([0.5], dtype=torch.float64), sampling)
    assert float(logprobs) == pytest.approx(math.log(2 / 3))  # sqrt(4) : sqrt(1), though top_k leaves one token


def test_top_k_and_top_p_keep_the_sets_worked_out_by_hand():
    assert kept((1, 2, 0.5, 4, 1.5), top_k=2) == [1, 3]
    assert kept((1, 2, 2, 4, 1), top_k=2) == [1, 2, 3]  # of equals, neither is dropped for the other
    assert kept((1, 2, 1, 4), top_k=9) == [0, 1, 2, 3]
    # Halves, quarters, eighths: what is needed to reach top_p, and not one more.
    assert kept((4, 2, 1, 1), top_p=0.4) == [0]
    assert kept((4, 2, 1, 1), top_p=0.51) == [0, 1]
    assert kept((4, 2, 1, 1), top_p=0.75) == [0, 1]
    assert kept((2, 4, 1, 1), top_p=1e-9) == [1]
    # top_p is taken of what top_k left: 4/6 reaches 0.6, which 4/8 would not have.
    assert kept((4, 2, 1, 1), top_k=2, top_p=0.6) == [0]


@settings(deadline=None, max_examples=50)
@given(seed=st.integers(0, 10_000), top_k=st.integers(1, 20), top_p=st.floats(0.05, 0.99))
def test_top_k_and_top_p_are_those_of_transformers(seed, top_k, top_p):
    generator = torch.Generator().manual_seed(seed)
    logprobs = torch.randn(3, 15, generator=generator, dtype=torch.float64).log_softmax(-1)
    expected = TopPLogitsWarper(top_p)(None, TopKLogitsWarper(top_k)(None, logprobs))
    assert torch.equal(keep_likely(logprobs, Sampling(top_k=top_k, top_p=top_p)), expected)


def test_uniforms_depend_on_where_the_draw_is_and_on_nothing_else():
    base = uniforms(1, 2, "a", 3, 5)
    assert base.tolist() == uniforms(1, 2, "a", 3, 5).tolist()
    assert base.tolist() == uniforms(1, 2, "a", 3, 9)[:5].tolist()  # a longer limit changes nothing before it
    others = [(0, 2, "a", 3), (1, 0, "a", 3), (1, 2, "b", 3), (1, 2, "a", 0), (12, 2, "a", 3), (1, 22, "a", 3)]
    assert all(base[0] != uniforms(*other, 5)[0] for other in others)
    # The bits are part of what a run is: these are written down, a change of them breaks resumed runs.
    assert uniforms(0, 0, "p", 0, 2).tolist() == [0.6693962563566186, 0.875673793812769]
    assert all(0 <= value < 1 for value in uniforms(0, 0, "p", 0, 1000))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -0.1}, "temperature is -0.1"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"top_k": -1}, "top_k is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options, words):
    with pytest.raises(SettingsError, match=words):
        Sampling(**options)
