"""Every back end of packed attention against one softmax under the full mask, on random layouts, in float64."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from medrl.errors import PolicyError
from medrl.policy.layout import Layout, pack, visible
from medrl.policy.packed_attention import BACK_ENDS, FlexPacked, choose_back_end, obstacle

WIDTH, SCALE = 16, 0.3


def layouts():
    group = st.tuples(st.integers(1, 9), st.lists(st.integers(1, 7), min_size=1, max_size=4))
    return st.lists(group, min_size=1, max_size=3).map(
        lambda groups: pack([torch.arange(p).expand(3, -1) for p, _ in groups], [lengths for _, lengths in groups])
    )


def drawn(layout: Layout, heads: int, kv_heads: int, device: str = "cpu", dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(len(layout.group))
    shapes = [heads, kv_heads, kv_heads]
    tensors = [torch.randn(1, n, len(layout.group), WIDTH, generator=generator, dtype=torch.float64) for n in shapes]
    weights = torch.randn(tensors[0].shape, generator=generator, dtype=torch.float64)
    query, key, value = (x.to(device, dtype).requires_grad_() for x in tensors)
    return (query, key, value), weights.to(device, dtype)


def oracle(query, key, value, layout: Layout):
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = (query @ key.transpose(-1, -2) * SCALE).masked_fill(~visible(layout), -torch.inf)
    return scores.softmax(-1) @ value


def check(name: str, layout: Layout, heads: tuple[int, int]) -> None:
    inputs, weights = drawn(layout, *heads)
    ours = BACK_ENDS[name](layout).attend(*inputs, SCALE)
    expected = oracle(*inputs, layout)
    torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)
    found = torch.autograd.grad((ours * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["dense", "varlen"])
@settings(deadline=None, max_examples=40)
@given(layout=layouts(), heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]))
def test_outputs_and_all_gradients_are_those_of_the_full_mask(name, layout, heads):
    check(name, layout, heads)


@pytest.mark.filterwarnings("ignore:.*flex_attention.*")
@settings(deadline=None, max_examples=8)
@given(layout=layouts(), heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]))
def test_flex_sees_what_the_full_mask_shows_in_value_and_gradient(layout, heads):
    # torch refuses flex gradients on a CPU, where only its plain formula, no kernel, computes them: good for a test.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_validate_device", lambda *_: None)
        check("flex", layout, heads)


def test_flex_makes_one_mask_for_layouts_of_the_same_lengths():
    positions = [torch.arange(5).expand(3, -1), torch.arange(4).expand(3, -1)]
    first, same = pack(positions, [[2, 3], [4]]), pack(positions, [[2, 3], [4]])
    # As many tokens in as many segments, but divided otherwise between the groups.
    other = pack(positions, [[2], [3, 4]])
    assert FlexPacked(first).mask is FlexPacked(same).mask
    assert FlexPacked(first).mask is not FlexPacked(other).mask


class Sizes(TorchDispatchMode):
    """The largest tensor that any operation made."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return made


@pytest.mark.parametrize(("name", "grows"), [("varlen", False), ("dense", True)])
def test_only_dense_makes_what_grows_with_the_square_of_a_group(name, grows):
    layout = pack([torch.arange(200).expand(3, -1)], [[100] * 6])
    inputs, weights = drawn(layout, 4, 2)
    with Sizes() as sizes:
        out = BACK_ENDS[name](layout).attend(*inputs, SCALE)
        torch.autograd.grad((out * weights).sum(), inputs)
    assert (sizes.largest > 2 * out.numel()) == grows


def test_auto_takes_the_fastest_that_works_and_says_which(caplog):
    with caplog.at_level("DEBUG", logger="medrl"):
        assert choose_back_end("auto", torch.empty(1), 64) == "varlen"
    assert "packed attention: varlen (chosen by auto" in caplog.text
    # Where no kernel of ours exists, the plain one is left.
    assert choose_back_end("auto", torch.empty(1, device="meta"), 64) == "dense"


def test_a_back_end_that_cannot_run_is_refused_with_those_that_can():
    with pytest.raises(PolicyError, match=r"flex has no backward pass on a cpu: choose auto or dense or varlen"):
        choose_back_end("flex", torch.empty(1), 64)
    with pytest.raises(PolicyError, match=r"no attention back end 'flash'.*dense, varlen, flex"):
        choose_back_end("flash", torch.empty(1), 64)
    assert "float32" in str(obstacle("varlen", torch.device("cuda"), torch.float32, 64))
    assert obstacle("flex", torch.device("cuda"), torch.float32, 64) is None
    assert "at least 16, not 8" in str(obstacle("flex", torch.device("cuda"), torch.float32, 8))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype", "tolerance"),
    [("dense", torch.float64, 1e-10), ("flex", torch.float32, 1e-2), ("varlen", torch.bfloat16, 3e-2)],
)
@settings(deadline=None, max_examples=12)
@given(layout=layouts(), heads=st.sampled_from([(4, 4), (4, 2), (12, 2)]))
def test_on_a_gpu_outputs_and_all_gradients_are_those_of_the_full_mask(name, dtype, tolerance, layout, heads):
    inputs, weights = drawn(layout, *heads, device="cuda", dtype=dtype)
    layout = layout.to("cuda")
    ours = BACK_ENDS[name](layout).attend(*inputs, SCALE)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = oracle(*exact, layout)
    found = torch.autograd.grad((ours * weights).sum(), inputs)
    wanted = torch.autograd.grad((expected * weights.double()).sum(), exact)
    for one, other in zip((ours, *found), (expected, *wanted), strict=True):
        assert float((one.double() - other).norm() / (other.norm() + 1e-12)) < tolerance
