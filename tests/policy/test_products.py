"""oneDNN's products are MKL's, up to the order of float32 sums; forced here, whatever the processor is."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from medrl.policy import products
from medrl.policy.products import linear, product, use_fast_products
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling
from medrl.types import Prompt

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


@pytest.fixture
def forced(monkeypatch):
    """Every product by oneDNN. Gives how many there were."""
    calls = []
    inner = products._by_onednn

    def by_onednn(a, columns):
        chosen = inner(a, columns)
        calls.append(chosen)
        return chosen

    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    monkeypatch.setattr(products, "_by_onednn", by_onednn)
    return calls


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def near(found: torch.Tensor, exact: torch.Tensor) -> None:
    """To the rounding of a float32 sum."""
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 1, 1), (1, 17, 5), (33, 64, 7), (200, 31, 129)])
def test_a_product_is_the_product(forced, m, k, n):
    a, b = rand(m, k), rand(k, n, seed=1)
    near(product(a, b), a.double() @ b.double())
    near(product(a.t().contiguous().t(), b.t().contiguous().t()), a.double() @ b.double())
    near(product(rand(k, m).t(), b), rand(k, m).t().double() @ b.double())
    assert all(forced) and len(forced) == 3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(6, 8), (1, 5, 8), (4, 1, 8)])
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, True)])
def test_a_linear_layer_and_its_gradients_are_the_exact_ones(forced, bias, shape, wanted):
    x, weight, offset = rand(*shape), rand(12, 8, seed=1), rand(12, seed=2) if bias else None
    slope = rand(*shape[:-1], 12, seed=3)
    found, exact = [], []
    for out, apply, dtype in ((found, linear, torch.float32), (exact, F.linear, torch.float64)):
        inputs = [t.detach().to(dtype).requires_grad_(g) for t, g in zip((x, weight), wanted, strict=True)]
        last = None if offset is None else offset.detach().to(dtype).requires_grad_()
        y = apply(*inputs, last)
        (y * slope.to(dtype)).sum().backward()
        out += [y.detach(), *(t.grad for t in (*inputs, last) if t is not None and t.requires_grad)]
    assert len(found) == len(exact) == 1 + sum(wanted) + bias
    for ours, theirs in zip(found, exact, strict=True):
        near(ours, theirs)
    assert all(forced) and forced


def test_other_precisions_and_small_products_are_torchs_own(monkeypatch):
    monkeypatch.setattr(products, "onednn_is_faster", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    assert torch.equal(product(rand(3, 4), rand(4, 5)), rand(3, 4) @ rand(4, 5))
    monkeypatch.setattr(products, "LEAST_WORK", 1)
    for dtype in (torch.float64, torch.bfloat16):
        a, b = rand(3, 4).to(dtype), rand(4, 5).to(dtype)
        assert torch.equal(product(a, b), a @ b) and torch.equal(linear(a, b.t()), a @ b)


@pytest.mark.parametrize("learns", [False, True])
def test_a_compiler_is_given_a_plain_product(forced, learns):
    layer = nn.Linear(16, 24)
    use_fast_products(nn.Sequential(layer))
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph.forward

    torch._dynamo.reset()
    x = rand(3, 16)
    with torch.set_grad_enabled(learns):
        found = torch.compile(layer, backend=backend, dynamic=True, fullgraph=True)(x)
    near(found.detach(), (x.double() @ layer.weight.double().t() + layer.bias.double()).detach())
    assert seen == [torch._C._nn.linear]


def test_a_packed_weight_is_forgotten_when_it_changes_or_learns(forced):
    layer = nn.Linear(16, 24)
    use_fast_products(nn.Sequential(layer))
    x = rand(3, 16)

    def answers() -> None:
        with torch.no_grad():
            for _ in range(2):
                near(layer(x), x.double() @ layer.weight.double().t() + layer.bias.double())
        assert layer in products._packed

    answers()
    with torch.no_grad():
        layer.weight.mul_(-2.0)
    answers()
    layer.load_state_dict({"weight": rand(24, 16, seed=5), "bias": rand(24, seed=6)})
    answers()
    torch.optim.SGD(layer.parameters(), lr=0.5)
    near(layer(x).detach(), (x.double() @ layer.weight.double().t() + layer.bias.double()).detach())
    assert layer not in products._packed


def test_a_policy_scores_learns_and_writes_as_on_torchs_own_products(make_policy, noise, monkeypatch):
    found = []
    for fast in (False, True):
        monkeypatch.setattr(products, "onednn_is_faster", lambda fast=fast: fast)
        monkeypatch.setattr(products, "LEAST_WORK", 1)
        policy = make_policy(torch.float32)
        encoded = [policy.encode_turn("a", "abc", [noise(1)]), policy.encode_turn("b", "c", [noise(2, 28, 56)])]
        scored = policy.logprobs(encoded, [[[20, 21, 22, 23], [30]], [[40, 41], [50, 51, 52]]])
        (scored.logprobs.sum() + scored.entropy.sum()).backward()
        gradients = torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])
        prompts = [Prompt(id=str(n), text="abc " * n, images=(), mode="think") for n in range(3)]
        written = generate(policy, prompts, Sampling(max_new_tokens=8), group_size=3)
        found.append((scored.logprobs.detach(), gradients, [[c.token_ids for c in group] for group in written]))
    (plain, plain_gradients, plain_tokens), (ours, gradients, tokens) = found
    torch.testing.assert_close(ours, plain, rtol=0, atol=2e-5)
    assert float((gradients - plain_gradients).norm() / plain_gradients.norm()) < 1e-4
    assert not torch.equal(gradients, plain_gradients)  # so it was another library
    assert tokens == plain_tokens


@pytest.mark.parametrize(
    ("capability", "about", "expected"),
    [("AVX512", "AuthenticAMD", True), ("AVX512", "GenuineIntel", False), ("AVX2", "AuthenticAMD", False)],
)
def test_the_processor_decides(monkeypatch, tmp_path, capability, about, expected):
    (tmp_path / "cpuinfo").write_text(f"vendor_id\t: {about}\n")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(products, "Path", lambda _: tmp_path / "cpuinfo")
    assert products.onednn_is_faster.__wrapped__() is expected
