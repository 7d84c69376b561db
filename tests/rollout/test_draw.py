"""A draw by blocks of the vocabulary is the draw over the whole of it."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from medrl.rollout.sampling import BLOCK, Sampling, draw_tokens, keep_likely, locate, uniforms

ALMOST_ONE = 1 - 2**-53
SIZES = [1, 2, 127, 128, 129, 1000, 8192]
OPTIONS = [{}, {"temperature": 0.6}, {"temperature": 1.7}, {"top_k": 5}, {"top_p": 0.8}, {"top_k": 40, "top_p": 0.5}]


def made(rows: int, size: int, seed: int = 0, spread: float = 3.0, impossible: float = 0.0) -> torch.Tensor:
    """(rows, size) logits, some of them -inf; the last token stays possible."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, size, generator=generator) * spread
    ruled_out = torch.rand(rows, size, generator=generator) < impossible
    ruled_out[:, -1] = False
    return logits.masked_fill(ruled_out, -math.inf)


def random(count: int) -> torch.Tensor:
    """(count,) uniforms, the ends of the interval among them."""
    uniform = torch.from_numpy(uniforms(0, 0, "p", 0, count))
    uniform[:3] = torch.tensor([0.0, ALMOST_ONE, 0.5], dtype=torch.float64)
    return uniform


def cumulative_shares(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """(B, V) in float64: the formula in one piece. What top-k and top-p keep is not the question here."""
    scores = logits / sampling.temperature
    kept = keep_likely(scores, sampling).isfinite()
    weights = scores.double().log_softmax(-1).exp().where(kept, 0.0)
    cumulative = weights.cumsum(-1)
    return cumulative / cumulative[:, -1:]


def in_one_piece(masses: np.ndarray, uniform: float) -> int:
    cumulative = masses.cumsum()
    return min(
        np.searchsorted(cumulative, uniform * cumulative[-1], side="right"), np.searchsorted(cumulative, cumulative[-1])
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("impossible", [0.0, 0.9])
def test_the_token_is_the_one_whose_interval_the_uniform_is_in(size, options, impossible):
    sampling, rows = Sampling(**options), 400 if size < 8192 else 60
    logits, uniform = made(rows, size, impossible=impossible), random(rows)
    cumulative = cumulative_shares(logits, sampling)
    tokens, _ = draw_tokens(logits, uniform, sampling)
    end = cumulative.gather(1, tokens[:, None]).squeeze(1)
    start = torch.where(tokens > 0, cumulative.gather(1, (tokens[:, None] - 1).clamp(min=0)).squeeze(1), 0.0)
    assert (end > start).all()  # a possible token
    # Up to the rounding of float32 exponentials: a border may lie a little elsewhere.
    assert ((start - 1e-6 <= uniform) & (uniform < end + 1e-6)).all()
    expected = torch.searchsorted(cumulative, uniform[:, None], right=True).squeeze(1)
    assert (tokens == expected).double().mean() > 0.99


@settings(deadline=None, max_examples=100)
@given(
    blocks=st.lists(
        st.lists(st.sampled_from([0.0, 1e-30, 0.1, 0.7, 3.0]), min_size=4, max_size=4), min_size=1, max_size=6
    ),
    uniform=st.one_of(st.sampled_from([0.0, ALMOST_ONE, 0.5]), st.floats(0, ALMOST_ONE)),
)
def test_two_levels_find_what_one_finds_but_for_the_last_bits(blocks, uniform):
    masses = torch.tensor([blocks], dtype=torch.float64)
    if masses.sum() == 0:
        return
    block, within = locate(masses.sum(-1), torch.tensor([uniform], dtype=torch.float64))
    place, _ = locate(masses[0, block], within)
    token = int(block * 4 + place)
    flat = masses.flatten().numpy()
    assert flat[token] > 0
    near = {in_one_piece(flat, min(max(uniform + step, 0.0), ALMOST_ONE)) for step in (-1e-14, 0.0, 1e-14)}
    assert min(near) <= token <= max(near)


def test_a_uniform_that_rounding_put_outside_stays_on_masses_that_are_there():
    masses = torch.tensor([[0.0, 0.0, 1.0, 2.0, 0.0]])
    found = [
        int(locate(masses, torch.tensor([u], dtype=torch.float64))[0]) for u in (-1e-16, 0.0, ALMOST_ONE, 1.0, 1.1)
    ]
    assert found == [2, 2, 3, 3, 3]


def test_how_far_into_a_mass_the_uniform_is():
    index, within = locate(
        torch.tensor([[1.0, 0.0, 4.0, 3.0]] * 3), torch.tensor([0.0, 0.25, 0.8125], dtype=torch.float64)
    )
    assert index.tolist() == [0, 2, 3] and within.tolist() == [0.0, 0.25, 0.5]


@pytest.mark.parametrize("size", [128, 129, 1000])
def test_counts_follow_the_softmax_as_closely_as_an_even_grid_can(size):
    logits, n = made(1, size, spread=1.0), 20_000
    grid = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    counts = torch.cat([draw_tokens(logits.expand(1000, -1), part, Sampling())[0] for part in grid.split(1000)])
    expected = logits[0].double().softmax(-1).numpy() * n
    assert np.abs(np.bincount(counts, minlength=size) - expected).max() < 1.05


@pytest.mark.parametrize("possible", [0, 126, 127, 128, 255, 256, 999])
@pytest.mark.parametrize("uniform", [0.0, 0.5, ALMOST_ONE])
def test_the_only_possible_token_is_drawn_for_certain(possible, uniform):
    logits = torch.full((1, 1000), -math.inf)
    logits[0, possible] = -7.0
    (token,), (logprob,) = draw_tokens(logits, torch.tensor([uniform], dtype=torch.float64), Sampling())
    assert token == possible and logprob == 0


def test_blocks_of_impossible_tokens_are_passed_over():
    logits = torch.full((1, 10 * BLOCK), -math.inf)
    for block in (3, 4, 7):
        logits[0, block * BLOCK + 5 : block * BLOCK + 55] = 1.5
    logits[0, 5 * BLOCK : 7 * BLOCK : 7] = -200.0  # possible, but for the range of float32
    logits[0, 7 * BLOCK + 54 :] = -math.inf
    uniform = torch.tensor([0.0, 49.5 / 149, 50.5 / 149, 99.5 / 149, 100.5 / 149, ALMOST_ONE], dtype=torch.float64)
    tokens, _ = draw_tokens(logits.expand(6, -1), uniform, Sampling())
    assert tokens.tolist() == [
        3 * BLOCK + 5,
        3 * BLOCK + 54,
        4 * BLOCK + 5,
        4 * BLOCK + 54,
        7 * BLOCK + 5,
        7 * BLOCK + 53,
    ]


@pytest.mark.parametrize("size", [5, 128, 129, 1000])
@pytest.mark.parametrize("options", [*OPTIONS, {"temperature": 0}], ids=str)
def test_a_row_that_is_not_a_number_gets_some_token_and_says_so(size, options):
    logits, uniform = made(6, size), random(6)
    expected, _ = draw_tokens(logits, uniform, Sampling(**options))
    broken = logits.clone()
    broken[1, size // 2] = math.nan
    broken[2] = math.nan
    broken[4] = -math.inf
    broken[5, size - 1] = math.inf
    tokens, logprobs = draw_tokens(broken, uniform, Sampling(**options))
    assert ((tokens >= 0) & (tokens < size)).all()
    assert logprobs.isnan().tolist() == [False, True, True, False, True, True]
    assert tokens[[0, 3]].tolist() == expected[[0, 3]].tolist()


@pytest.mark.parametrize("size", [*SIZES, 151_936])
@pytest.mark.parametrize("options", [*OPTIONS, {"temperature": 0}], ids=str)
def test_logprobs_are_as_good_as_float32_can_be(size, options):
    logits, uniform, sampling = made(8, size, spread=5.0), random(8), Sampling(**options)
    tokens, logprobs = draw_tokens(logits, uniform, sampling)
    exact = (logits.double() / (sampling.temperature or 1)).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert logprobs.dtype == torch.float32
    # Half a step of float32 at the largest scores, once for the division and once for the difference.
    steps = 2 * torch.finfo(torch.float32).eps * max(1.0, float(logits.abs().max()) / (sampling.temperature or 1))
    assert (logprobs.double() - exact).abs().max() <= steps


@pytest.mark.parametrize("ties", [[0, 1], [127, 128], [130, 131, 400], [255, 999], [998, 999]])
def test_greedy_takes_the_first_of_equals(ties):
    logits = made(3, 1000)
    logits -= logits.max()
    logits[:, ties] = 0.5
    logits[:, 5] = torch.nextafter(torch.tensor(0.5), torch.tensor(0.0))  # no equal, but its exponential is
    tokens, _ = draw_tokens(logits, random(3), Sampling(temperature=0))
    assert tokens.tolist() == logits.argmax(-1).tolist()


@pytest.mark.parametrize("options", [*OPTIONS, {"temperature": 0}], ids=str)
def test_logits_stay_as_they_are(options):
    for size in (128, 129):
        logits = made(4, size)
        before = logits.clone()
        draw_tokens(logits, random(4), Sampling(**options))
        assert torch.equal(logits, before)


@pytest.mark.parametrize("options", [*OPTIONS, {"temperature": 0}], ids=str)
def test_no_number_is_looked_at_and_no_shape_depends_on_one(options):
    """As in a captured step: tensors without contents raise where Python asks for a number."""
    with FakeTensorMode():
        logits, uniform = torch.empty(4, 1000), torch.empty(4, dtype=torch.float64)
        tokens, logprobs = draw_tokens(logits, uniform, Sampling(**options))
        assert tokens.shape == logprobs.shape == (4,)
