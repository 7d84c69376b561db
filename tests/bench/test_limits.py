"""The limit's arithmetic, against numbers worked out by hand."""

import pytest

from medrl.bench.limits import (
    Cost,
    Rates,
    Work,
    decode_cost,
    head_weights,
    layer_weights,
    parameters,
    phase_costs,
    step_costs,
    stream_flops,
    vision_flops,
)
from medrl.bench.models import SIZES, Size, find_size
from medrl.errors import SettingsError

H100 = Rates(bytes_per_s=3.0e12, flops_per_s=798e12)


def work(image_px: int = 448, **changes) -> Work:
    return Work(
        **{"prompts": 8, "group": 8, "image_px": image_px, "prompt_tokens": 80, "completion_tokens": 160} | changes
    )


def test_the_2b_model_has_the_published_numbers_of_weights():
    size = SIZES["2b"]
    assert layer_weights(size) == 28 * (2 * 1536**2 + 2 * 1536 * 256 + 3 * 1536 * 8960)
    assert layer_weights(size) == pytest.approx(1.310e9, rel=1e-3)
    assert head_weights(size) == pytest.approx(0.233e9, rel=2e-3)
    assert parameters(size) == pytest.approx(2.208e9, rel=1e-3)


def test_shapes_follow_from_the_image():
    assert (work(448).patches, work(448).prompt_length) == (1024, 336)
    assert (work(1008).patches, work(1008).prompt_length) == (5184, 1376)
    assert work(450).patches == work(475).patches == 1024  # whole merged patches


@pytest.mark.parametrize(
    ("image_px", "image_tflops", "forward_tflops", "limit_s"),
    [(448, 1.48, 51.3, 0.478), (1008, 11.03, 152.6, 1.123)],
)
def test_a_step_of_the_2b_model_costs_what_was_worked_out(image_px, image_tflops, forward_tflops, limit_s):
    size, shapes = SIZES["2b"], work(image_px)
    assert vision_flops(size, shapes.patches) / 1e12 == pytest.approx(image_tflops, rel=2e-3)
    forward = 8 * vision_flops(size, shapes.patches) + stream_flops(size, shapes)
    assert forward / 1e12 == pytest.approx(forward_tflops, rel=1e-3)
    costs = step_costs(size, shapes, kl=True, element_bytes=2)
    assert sum(cost.seconds(H100) for cost in costs.values()) == pytest.approx(limit_s, rel=2e-3)
    assert "reference" not in step_costs(size, shapes, kl=False, element_bytes=2)


@pytest.mark.parametrize(("kl", "passes"), [(True, 3), (False, 2)])
def test_phases_hold_what_is_timed_in_them_and_cost_the_same_together(kl, passes):
    """``vision`` is every forward pass of the tower; its backward pass stays with the policy's."""
    size, shapes = SIZES["2b"], work(448)
    whole = step_costs(size, shapes, kl=kl, element_bytes=2)
    timed = phase_costs(size, shapes, kl=kl, element_bytes=2)
    images, text = 8 * vision_flops(size, shapes.patches), stream_flops(size, shapes)
    assert timed["vision"] == Cost(passes * images, 0.0) and set(timed) == {*whole, "vision"}
    assert timed["policy"].flops == pytest.approx(3 * text + 2 * images)
    assert ("reference" in timed) == kl and (not kl or timed["reference"].flops == pytest.approx(text))
    assert (timed["decode"], timed["optimizer"]) == (whole["decode"], whole["optimizer"])
    assert sum(c.seconds(H100) for c in timed.values()) == pytest.approx(sum(c.seconds(H100) for c in whole.values()))


def test_decoding_two_tokens_of_a_model_small_enough_to_count():
    size = Size(
        hidden=4, layers=1, heads=1, kv_heads=1, intermediate=2, vocabulary=10, tied=True,
        vision_hidden=4, vision_layers=1, vision_heads=1,
    )  # fmt: skip
    shapes = work(28, prompts=1, group=3, prompt_tokens=4, completion_tokens=2)
    assert shapes.prompt_length == 5
    weights = 4 * 16 + 3 * 8 + 40
    cost = decode_cost(size, shapes, element_bytes=2)
    # Two steps read the weights, five cached tokens of 8 numbers each time, and the three rows' one token the second.
    assert cost.bytes == 2 * (2 * weights + 2 * 5 * 8 + 3 * 8)
    # Three rows attend to 5 + 1, then 5 + 2 tokens, two products of width 4.
    assert cost.flops == 2 * weights * 6 + 4 * 4 * 3 * (6 + 7)


def test_a_phase_takes_the_longer_of_its_arithmetic_and_its_traffic():
    rates = Rates(bytes_per_s=10.0, flops_per_s=100.0)
    assert Cost(200.0, 10.0).seconds(rates) == 2.0
    assert Cost(200.0, 50.0).seconds(rates) == 5.0


def test_a_size_nobody_knows_is_refused_with_those_there_are():
    assert find_size("qwen2-vl-2b") is SIZES["2b"]
    with pytest.raises(SettingsError, match=r"no model size '3b'.*tiny, 25m, 2b, 7b"):
        find_size("3b")
