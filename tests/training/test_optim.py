import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn

from medrl.errors import CheckpointError, NonFiniteError, SettingsError
from medrl.training import optim
from medrl.training.optim import AdamW, Optim, Weight, learning_rate

PLAIN = Optim(lr=0.01, weight_decay=0.1, max_grad_norm=1.0)


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2)).to(dtype)


def set_gradients(model: nn.Module, step: int, scale: float = 1.0) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        gradient = torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * scale
        parameter.grad = gradient.to(parameter.dtype)


def weights_of(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same_bits(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [0.01, 5.0])
def test_full_precision_steps_are_those_of_torch_to_the_bit(dtype, scale):
    ours, theirs = small_model(dtype), small_model(dtype)
    matrices = [p for p in theirs.parameters() if p.ndim >= 2]
    others = [p for p in theirs.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    oracle = torch.optim.AdamW(groups, lr=0.01)
    optimizer = AdamW(ours.named_parameters(), PLAIN)
    for step in range(5):
        set_gradients(ours, step, scale)
        set_gradients(theirs, step, scale)
        norm = optimizer.step(0.01 / (step + 1))
        expected = nn.utils.clip_grad_norm_(matrices + others, 1.0)
        for group in oracle.param_groups:
            group["lr"] = 0.01 / (step + 1)
        oracle.step()
        assert norm == pytest.approx(float(expected), rel=1e-6)
    assert_same_bits(weights_of(ours), weights_of(theirs))


def test_bfloat16_weights_are_the_rounded_weights_of_a_float32_run():
    half, full = small_model(torch.bfloat16), small_model(torch.bfloat16).float()
    optimizers = [AdamW(model.named_parameters(), PLAIN) for model in (half, full)]
    for step in range(20):
        set_gradients(half, step)
        for small, large in zip(half.parameters(), full.parameters(), strict=True):
            large.grad = small.grad.float()  # pyright: ignore[reportOptionalMemberAccess]
        assert len({optimizer.step(1e-3) for optimizer in optimizers}) == 1
    assert_same_bits(weights_of(half), {name: tensor.bfloat16() for name, tensor in weights_of(full).items()})


def test_updates_too_small_for_bfloat16_add_up():
    # Near 1 a bfloat16 moves in steps of 2^-8 downward: a thousand updates of 1e-5 are lost one by one, but make 0.01.
    weight = nn.Parameter(torch.ones(4, 4, dtype=torch.bfloat16))
    optimizer = AdamW([("weight", weight)], Optim())
    for _ in range(1000):
        weight.grad = torch.ones_like(weight)
        optimizer.step(1e-5)
    assert weight[0, 0].item() == pytest.approx(0.99, abs=2**-8)
    assert weight[0, 0].item() < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_precision_parameters_have_no_second_copy(dtype):
    optimizer = AdamW(small_model(dtype).named_parameters(), PLAIN)
    assert all(weight.master() is weight.parameter for weight in optimizer.weights)
    assert optimizer.state_dict() == ({}, {})


def test_the_norm_is_that_of_all_gradients_and_clipping_scales_all_by_it():
    # gradients 3 and 4: norm 5; SGD-like first Adam step is lr * sign, so the scale shows in the first moment
    model = nn.ParameterDict({"a": torch.zeros(1, 1), "b": torch.zeros(1, 1)})
    model["a"].grad, model["b"].grad = torch.full((1, 1), 3.0), torch.full((1, 1), 4.0)
    optimizer = AdamW(model.named_parameters(), Optim(max_grad_norm=1.0))
    assert optimizer.step(0.1) == 5.0
    tensors, steps = optimizer.state_dict()
    assert tensors["a.exp_avg"].item() == pytest.approx(0.1 * 3 / 5, rel=1e-5)
    assert tensors["b.exp_avg"].item() == pytest.approx(0.1 * 4 / 5, rel=1e-5)
    assert steps == {"a": 1, "b": 1}


def test_decay_shrinks_matrices_only():
    model = nn.ParameterDict({"matrix": torch.ones(2, 2), "bias": torch.ones(2)})
    for parameter in model.values():
        parameter.grad = torch.zeros_like(parameter)
    AdamW(model.named_parameters(), Optim(weight_decay=0.5)).step(0.1)
    assert model["matrix"].tolist() == [[pytest.approx(0.95)] * 2] * 2
    assert model["bias"].tolist() == [1.0, 1.0]


def test_a_tied_weight_is_stepped_once_under_its_first_name():
    model = nn.Module()
    model.embed, model.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
    model.head.weight = model.embed.weight
    optimizer = AdamW(model.named_parameters(remove_duplicate=False), PLAIN)
    assert [weight.name for weight in optimizer.weights] == ["embed.weight"]
    set_gradients(model, 0)
    optimizer.step(0.01)
    assert optimizer.state_dict()[1] == {"embed.weight": 1}


def test_frozen_parameters_and_those_without_a_gradient_stay():
    model = small_model()
    model[0].requires_grad_(False)
    before = weights_of(model)
    optimizer = AdamW(model.named_parameters(), PLAIN)
    model[2].bias.grad = torch.ones(2)  # pyright: ignore[reportArgumentType]
    optimizer.step(0.1)
    changed = [name for name, tensor in weights_of(model).items() if not torch.equal(tensor, before[name])]
    assert changed == ["2.bias"]


def test_gradients_are_cleared_after_a_step():
    for dtype in (torch.float32, torch.bfloat16):
        model = small_model(dtype)
        optimizer = AdamW(model.named_parameters(), PLAIN)
        set_gradients(model, 0)
        optimizer.step(0.1)
        assert [parameter.grad for parameter in model.parameters()] == [None] * 6
        assert [weight.gradient for weight in optimizer.weights] == [None] * 6


def test_micro_batches_of_bfloat16_gradients_are_summed_in_float32():
    weight = nn.Parameter(torch.zeros(1, 1, dtype=torch.bfloat16))
    optimizer = AdamW([("weight", weight)], Optim(max_grad_norm=1e9))
    with optimizer.summing():
        for gradient in (256.0, 1.0, 1.0):  # 256 + 1 is 256 in bfloat16
            (weight * gradient).sum().backward()
            assert weight.grad is None
    assert optimizer.step(0.1) == 258.0
    weight.sum().backward()
    assert weight.grad is not None  # outside, gradients stay where torch puts them


@given(st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1))
def test_a_bfloat16_weight_and_its_lower_half_hold_a_float32_one_to_the_bit(bits):
    exact = np.array(bits, dtype=np.int32)
    exact = exact[np.isfinite(exact.view(np.float32))]
    parameter = nn.Parameter(torch.zeros(len(exact), dtype=torch.bfloat16))
    weight = Weight("weight", parameter)
    weight.set(torch.from_numpy(exact).view(torch.float32))
    assert np.array_equal(weight.master().view(torch.int32).numpy(), exact)
    # The nearest in bfloat16, up in size from the middle: in integers of Python's.
    sizes = [(abs(int(number)) if number >= 0 else int(number) + 2**31) for number in exact]
    nearest = [((size + 2**15) >> 16) - (2**15 if number < 0 else 0) for size, number in zip(sizes, exact, strict=True)]
    assert parameter.detach().view(torch.int16).tolist() == nearest


def test_what_a_bfloat16_weight_keeps_beside_it_is_half_as_large_as_a_float32_one():
    weight = Weight("weight", nn.Parameter(torch.ones(8, 4, dtype=torch.bfloat16)))
    assert weight.low is not None and weight.low.nbytes == 8 * 4 * 2
    assert weight.full_bytes == 8 * 4 * 4


@pytest.mark.parametrize("numbers", [1, 20, 40, 2**28])
def test_gradients_are_widened_in_parts_and_the_parts_change_nothing(monkeypatch, numbers):
    """A step that is not cut into micro-batches keeps no float32 sums of all gradients."""
    expected = small_model(torch.bfloat16)
    whole = AdamW(expected.named_parameters(), Optim(max_grad_norm=0.1))
    monkeypatch.setattr(optim, "WIDENED", numbers)
    model = small_model(torch.bfloat16)
    optimizer = AdamW(model.named_parameters(), Optim(max_grad_norm=0.1))
    widest = []
    inner = optim.clip_grads_with_norm_

    def clip(masters, *given):
        assert {master.dtype for master in masters} == {torch.float32}
        widest.append(sum(master.numel() for master in masters) if len(masters) > 1 else 0)
        return inner(masters, *given)

    for number in range(3):
        set_gradients(expected, number)
        for weight in whole.weights:
            weight.add_gradient(weight.parameter)  # all in float32, as after a cut
        before = whole.step(0.1)
        monkeypatch.setattr(optim, "clip_grads_with_norm_", clip)
        set_gradients(model, number)
        assert optimizer.step(0.1) == before > 0.1
        monkeypatch.setattr(optim, "clip_grads_with_norm_", inner)
    assert_same_bits(weights_of(model), weights_of(expected))
    assert_same_bits(optimizer.state_dict()[0], whole.state_dict()[0])
    assert optimizer.state_dict()[1] == whole.state_dict()[1]
    assert max(widest) <= numbers
    again = AdamW(small_model(torch.bfloat16).named_parameters(), PLAIN)
    again.load_state_dict(*whole.state_dict())
    assert_same_bits(again.state_dict()[0], whole.state_dict()[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_names_its_parameter_before_anything_changes(dtype, bad):
    model = small_model(dtype)
    optimizer = AdamW(model.named_parameters(), PLAIN)
    set_gradients(model, 0)
    optimizer.step(0.1)
    before, state = weights_of(model), copy.deepcopy(optimizer.state_dict())
    set_gradients(model, 1)
    model[2].weight.grad[0, 0] = bad  # pyright: ignore[reportIndexIssue, reportOptionalSubscript]
    expected = "the gradient of 2.weight is not finite in 1 of 16 places; nothing was updated"
    with pytest.raises(NonFiniteError, match=f"^{expected}$"):
        optimizer.step(0.1)
    assert_same_bits(weights_of(model), before)
    assert_same_bits(optimizer.state_dict()[0], state[0])
    assert optimizer.state_dict()[1] == state[1]
    optimizer.zero_grad()
    set_gradients(model, 1)
    assert math.isfinite(optimizer.step(0.1))


def test_a_norm_that_overflows_names_the_largest_gradient():
    model = nn.ParameterDict({"a": torch.zeros(1, 1), "b": torch.zeros(1, 1)})
    model["a"].grad, model["b"].grad = torch.full((1, 1), 1.0), torch.full((1, 1), 3e38)
    model["c"] = nn.Parameter(torch.zeros(2))
    model["c"].grad = torch.full((2,), 2e38)
    with pytest.raises(NonFiniteError, match=r"the gradient norm overflows; the largest gradient is 3e\+38, of b;"):
        AdamW(model.named_parameters(), Optim()).step(0.1)


def test_a_step_without_any_gradient_changes_nothing():
    model = small_model()
    before = weights_of(model)
    assert AdamW(model.named_parameters(), PLAIN).step(0.1) == 0.0
    assert_same_bits(weights_of(model), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("stop", [0, 1, 7])
def test_a_run_resumed_from_safetensors_ends_with_the_same_bits(dtype, stop):
    def run(model, optimizer, first, last):
        for step in range(first, last):
            set_gradients(model, step)
            optimizer.step(learning_rate(PLAIN, step, 12))

    straight = small_model(dtype)
    straight_optimizer = AdamW(straight.named_parameters(), PLAIN)
    run(straight, straight_optimizer, 0, 12)

    first = small_model(dtype)
    first_optimizer = AdamW(first.named_parameters(), PLAIN)
    run(first, first_optimizer, 0, stop)
    tensors, steps = first_optimizer.state_dict()
    stored = save({name: tensor.detach() for name, tensor in tensors.items()})

    second = small_model(dtype)
    second.load_state_dict(first.state_dict())
    second_optimizer = AdamW(second.named_parameters(), PLAIN)
    second_optimizer.load_state_dict(load(stored), steps)
    run(second, second_optimizer, stop, 12)
    assert_same_bits(weights_of(second), weights_of(straight))
    (ours, our_steps), (expected, expected_steps) = second_optimizer.state_dict(), straight_optimizer.state_dict()
    assert_same_bits(ours, expected)
    assert our_steps == expected_steps == {name: 12 for name, _ in straight.named_parameters()}


def test_loaded_state_is_a_copy():
    model, twin = small_model(torch.bfloat16), small_model(torch.bfloat16)
    optimizer, other = AdamW(model.named_parameters(), PLAIN), AdamW(twin.named_parameters(), PLAIN)
    set_gradients(model, 0)
    optimizer.step(0.1)
    other.load_state_dict(*optimizer.state_dict())
    state = copy.deepcopy(other.state_dict()[0])
    set_gradients(model, 1)
    optimizer.step(0.1)
    assert_same_bits(other.state_dict()[0], state)


def test_state_of_other_parameters_is_refused():
    optimizer = AdamW(small_model(torch.bfloat16).named_parameters(), PLAIN)
    with pytest.raises(CheckpointError, match=r"0\.weight\.master, .* and 3 more missing from it, none unknown"):
        optimizer.load_state_dict({}, {})
    with pytest.raises(CheckpointError, match=r"none missing from it, lora, lora\.exp_avg unknown to this model"):
        optimizer.load_state_dict({**optimizer.state_dict()[0], "lora.exp_avg": torch.zeros(1)}, {"lora": 3})
    tensors = {**optimizer.state_dict()[0], "1.bias.master": torch.zeros(3)}
    with pytest.raises(CheckpointError, match=r"1\.bias\.master of shape \(3,\), but the parameter has \(8,\)"):
        optimizer.load_state_dict(tensors, {})


def test_the_schedules_by_hand():
    def rates(**values):
        return [learning_rate(Optim(lr=1.0, **values), step, 4) for step in range(5)]

    assert rates() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert rates(schedule="constant") == [1.0] * 5
    assert rates(schedule="cosine") == pytest.approx(
        [1.0, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2, 0.0]
    )
    assert rates(min_lr_fraction=0.2) == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])
    assert rates(warmup_steps=2) == [0.5, 1.0, 1.0, 0.5, 0.0]
    assert rates(warmup_steps=8) == pytest.approx([1 / 8, 2 / 8, 3 / 8, 4 / 8, 5 / 8])


def test_the_linear_schedule_without_warm_up_is_that_of_transformers():
    from transformers import get_linear_schedule_with_warmup

    oracle = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1e-6)
    scheduler = get_linear_schedule_with_warmup(oracle, 0, 50)
    for step in range(50):
        assert learning_rate(Optim(), step, 50) == pytest.approx(scheduler.get_last_lr()[0], rel=1e-12)
        oracle.step()
        scheduler.step()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lr": 0}, "lr is 0, but it must be greater than 0.0"),
        ({"betas": (0.9, 1.0)}, "betas is [0.9, 1.0], but each must be at least 0 and less than 1"),
        ({"schedule": "step"}, "schedule is the text 'step', but it must be 'linear', 'cosine' or 'constant'"),
        ({"min_lr_fraction": 2}, "min_lr_fraction is 2, but it must be at most 1.0"),
        ({"max_grad_norm": -1}, "max_grad_norm is -1, but it must be greater than 0.0"),
    ],
)
def test_a_setting_out_of_range_says_what_would_do(values, message):
    with pytest.raises(SettingsError) as caught:
        Optim(**values)
    assert str(caught.value) == message
