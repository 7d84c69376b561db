"""The head's kernels against float64: interpreted where there is no GPU, compiled for one always."""

import os
import subprocess

import pytest
import torch

from medrl.errors import PolicyError
from medrl.policy import fused
from medrl.policy.logprobs import token_logprobs

triton = pytest.importorskip("triton")
kernels = pytest.importorskip("medrl.policy.head_kernels")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
# Compiled where there is a GPU, so ``-m gpu`` runs them; interpreted where there is none.
runs_kernels = (
    pytest.mark.gpu
    if DEVICE == "cuda"
    else pytest.mark.skipif(not INTERPRETED, reason="runs interpreted, in another process")
)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
def test_all_of_this_interpreted(run_interpreted):
    run_interpreted(__file__)


def drawn(rows, vocabulary, width=6, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows + vocabulary)
    hidden = 2 * torch.randn(rows, width, generator=generator)
    weight = torch.randn(vocabulary, width, generator=generator)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[0] = vocabulary - 1
    coefficients = torch.randn(2, rows, generator=generator)
    return [x.to(DEVICE) for x in (hidden.to(dtype), weight.to(dtype), targets, coefficients)]


@runs_kernels
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("vocabulary", [2, 300, kernels.WORDS, kernels.WORDS + 1, 2 * kernels.WORDS + 9])
def test_values_and_gradients_are_those_of_float64(vocabulary, temperature):
    hidden, weight, targets, coefficients = drawn(7, vocabulary)
    hidden.requires_grad_(), weight.requires_grad_()
    logprobs, entropy = token_logprobs(hidden, weight, targets, temperature=temperature, chunk_rows=3, kernels=kernels)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    expected = (wide[0] @ wide[1].t() / temperature).log_softmax(-1)
    expected_entropy = -(expected.exp() * expected).sum(-1)
    expected = expected.gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs.double(), expected, rtol=2e-5, atol=2e-5)
    torch.testing.assert_close(entropy.double(), expected_entropy, rtol=2e-5, atol=2e-5)
    for of_logprob, of_entropy in ((1, 0), (0, 1), (1, -2)):
        ours = (of_logprob * coefficients[0] * logprobs).sum() + (of_entropy * coefficients[1] * entropy).sum()
        theirs = (of_logprob * coefficients[0] * expected).sum() + (
            of_entropy * coefficients[1] * expected_entropy
        ).sum()
        found = torch.autograd.grad(ours, (hidden, weight), retain_graph=True)
        right = torch.autograd.grad(theirs, wide, retain_graph=True)
        for a, b in zip(found, right, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-3, atol=1e-4)


@runs_kernels
def test_an_entropy_that_nobody_asks_for_costs_nothing(monkeypatch):
    hidden, weight, targets, coefficients = drawn(4, 50)
    hidden.requires_grad_()
    asked = []
    slopes = kernels.slopes
    monkeypatch.setattr(kernels, "slopes", lambda *given: asked.append(given[5]) or slopes(*given))
    logprobs, _ = token_logprobs(hidden, weight, targets, kernels=kernels)
    (logprobs * coefficients[0]).sum().backward()
    assert asked == [None]


@runs_kernels
def test_extreme_logits_stay_finite():
    hidden = torch.tensor([[1e4], [-1e4]], device=DEVICE, requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    targets = torch.tensor([0, 0], device=DEVICE)
    logprobs, entropy = token_logprobs(hidden, weight, targets, kernels=kernels)
    assert logprobs.tolist() == [0.0, -2e4] and entropy.tolist() == [0.0, 0.0]
    logprobs.sum().backward()
    assert hidden.grad is not None and hidden.grad.flatten().tolist() == [0.0, 2.0]


@runs_kernels
@pytest.mark.parametrize("place", ["statistics", "slopes"])
def test_kernels_are_compared_with_the_plain_computation_before_they_are_used(monkeypatch, place):
    device = torch.device(DEVICE)
    fused.head_differs.cache_clear()
    assert fused.head_differs(device) is None
    fused.head_differs.cache_clear()
    inner = getattr(kernels, place)

    def off(*given):
        found = inner(*given)
        return (*found[:2], found[2] * 1.01) if place == "statistics" else found * 1.01

    monkeypatch.setattr(kernels, place, off)
    assert "other numbers" in (fused.head_differs(device) or "")
    fused.head_differs.cache_clear()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler. Please specify via CC environment variable"),
        subprocess.CalledProcessError(1, ["gcc", "main.c"]),  # without Python's headers
        PermissionError(13, "Permission denied", "/.triton/cache"),
        triton.runtime.errors.OutOfResources(300_000, 101_376, "shared memory"),
        triton.compiler.errors.CompilationError("x = 1", None, "no such thing"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_kernels_that_cannot_be_built_are_not_used_and_it_is_said_why(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(kernels, "statistics", fail)
    fused.head_differs.cache_clear()
    found = fused.head_differs(torch.device("cpu")) or ""
    fused.head_differs.cache_clear()
    assert "cannot be built here" in found and " ".join(str(error).split()) in found
    assert not fused.choose("head", "auto", torch.device("cuda"), found)
    with pytest.raises(PolicyError, match="cannot be built here"):
        fused.choose("head", True, torch.device("cuda"), found)


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), torch.AcceleratorError("fault"), ValueError("a bug")]
)
def test_what_says_nothing_of_kernels_ends_the_comparison(monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(kernels, "statistics", fail)
    fused.head_differs.cache_clear()
    with pytest.raises(type(error), match=str(error)):
        fused.head_differs(torch.device("cpu"))


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_on_a_cpu_auto_means_torch_and_insisting_says_why(make_policy):
    policy = make_policy()
    prompts = [policy.encode_turn("one", "what is it?", [])]
    policy.logprobs(prompts, [[[1, 2]]])
    assert policy.head_fused is False
    policy = make_policy()
    policy.kernels = True
    with pytest.raises(PolicyError, match=r"for head the kernels are for a CUDA GPU, not for a cpu"):
        policy.logprobs(prompts, [[[1, 2]]])


@pytest.mark.gpu
def test_a_policy_on_a_gpu_uses_them(make_policy):
    policy = make_policy(torch.bfloat16)
    policy.model.to("cuda")
    prompts = [policy.encode_turn("one", "what is it?", [])]
    plain = make_policy(torch.bfloat16)
    plain.model.to("cuda")
    plain.kernels = False
    found, expected = (p.logprobs(prompts, [[[1, 2, 3], [4, 5]]]) for p in (policy, plain))
    assert policy.head_fused and not plain.head_fused
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.entropy, expected.entropy, rtol=1e-4, atol=1e-4)


@pytest.mark.skipif(INTERPRETED, reason="nothing is compiled there")
@pytest.mark.parametrize("element", ["bf16", "fp32"])
def test_kernels_compile_for_an_h100(element):
    from triton.backends.compiler import GPUTarget

    constants = {"_statistics": {"WORDS": kernels.WORDS}, "_slopes": {"WORDS": kernels.WORDS, "ENTROPY": True}}
    kinds = {"targets": "*i64", "vocabulary": "i32", "cold": "fp32", "slopes": f"*{element}"}
    for name, values in constants.items():
        kernel = getattr(kernels, name)
        signature = {arg: "constexpr" if arg in values else kinds.get(arg, "*fp32") for arg in kernel.arg_names}
        source = triton.compiler.ASTSource(kernel, signature, values)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 8})
        assert len(compiled.asm["cubin"]) > 0
