"""Compiled layers say what plain ones say, in training and in decoding; what cannot be compiled is named.

Most tests trace and cut as inductor does, but run torch's own operations, so that float64 stays exact and no compiler
is needed; the slow one and those for a GPU make the kernels.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from medrl.errors import PolicyError
from medrl.policy import layers
from medrl.policy.layers import choose_compilation
from medrl.policy.lora import Lora
from medrl.policy.policy import Policy
from medrl.rollout import scheduler
from medrl.rollout.decoder import Decoder
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling
from medrl.types import Prompt

COMPLETIONS = [[[20, 21, 22, 23], [30]], [[40, 41], [50, 51, 52]]]
OTHERS = [[[[20], [21, 22]], [[23, 24, 25, 26, 27, 28], [29]]], [[[20, 30, 40]] * 3, [[20, 31, 41, 51]] * 4]]
PROMPTS = [Prompt(id=str(n), text="abc " * n, images=(), mode="think") for n in range(3)]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture(scope="module")
def encoded(policy, noise):
    """Images of two sizes."""
    return [policy.encode_turn("a", "abc", [noise(1)]), policy.encode_turn("b", "c", [noise(2), noise(3, 28, 56)])]


@pytest.fixture
def compiled(make_policy):
    """A function that makes a policy and compiles it as a test can bear."""

    def make(*, backend: str = "eager", lora: bool = False, recompute: bool = False) -> Policy:
        torch._dynamo.reset()
        policy = make_policy()
        if lora:
            adapt(policy)
        if recompute:
            policy.checkpoint_activations()
        policy.compile_layers(backend=backend)
        return policy

    return make


@pytest.fixture(autouse=True)
def a_compiler_is_there(monkeypatch):
    monkeypatch.setattr(layers.shutil, "which", lambda name: f"/usr/bin/{name}")


def adapt(policy: Policy) -> Policy:
    """Adapters that do something."""
    policy.add_lora(Lora(rank=2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return policy


def pass_through(policy: Policy, encoded, completions) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and the gradient of every parameter that has one."""
    policy.model.zero_grad()
    scored = policy.logprobs(encoded, completions)
    weights = torch.linspace(-1, 2, scored.logprobs.numel(), dtype=torch.float64).view_as(scored.logprobs)
    (scored.logprobs * weights.to(scored.logprobs)).sum().backward()
    return scored.logprobs.detach(), {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


def same(found, expected, rtol: float = 1e-9, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found[0], expected[0], rtol=rtol, atol=atol)
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found[1], expected[1], rtol=rtol, atol=atol)


def tokens(completions) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in completions]


def test_every_gradient_is_the_plain_one_and_nothing_is_compiled_again_for_other_lengths_or_images(
    make_policy, compiled, encoded, noise, caplog
):
    with caplog.at_level("WARNING", logger="medrl"):
        plain, policy = make_policy(), compiled(backend="aot_eager")
    assert caplog.text == ""  # the only cut is around attention
    assert policy.compiled and all(parameter.grad is None for parameter in policy.model.parameters())
    graphs = counters["stats"]["unique_graphs"]
    same(pass_through(policy, encoded, COMPLETIONS), pass_through(plain, encoded, COMPLETIONS))
    more = [
        plain.encode_turn("c", "d", [noise(4)]),
        plain.encode_turn("d", "", [noise(5, 112, 56), noise(6), noise(7)]),
    ]
    for images, completions in zip((encoded, more), OTHERS, strict=True):
        same(pass_through(policy, images, completions), pass_through(plain, images, completions))
    assert graphs == counters["stats"]["unique_graphs"] > 0


def test_one_compilation_serves_all_layers(compiled):
    with torch._dynamo.config.patch(recompile_limit=1, fail_on_recompile_limit_hit=True):
        compiled()  # a pass over images and completions, through layers of both kinds


def test_with_adapters_and_recomputed_layers_the_gradient_and_the_reference_are_the_plain_ones(
    make_policy, compiled, encoded
):
    plain = adapt(make_policy())
    policy = compiled(lora=True, recompute=True)
    same(pass_through(policy, encoded, COMPLETIONS), pass_through(plain, encoded, COMPLETIONS))
    with torch.no_grad():
        found, expected = (p.reference.logprobs(encoded, COMPLETIONS).logprobs for p in (policy, plain))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_compiled_layers_write_what_plain_ones_write(make_policy, compiled, monkeypatch):
    expected = generate(make_policy(), PROMPTS, Sampling(max_new_tokens=6), group_size=2)
    policy = compiled()
    monkeypatch.setattr(scheduler, "_open", lambda *parts: Decoder(*parts, static=True))  # as a GPU captures them
    counts = [counters["stats"]["unique_graphs"]]
    for sampling, group_size in ((Sampling(max_new_tokens=1), 1), (Sampling(max_new_tokens=6), 2)):
        found = generate(policy, PROMPTS, sampling, group_size=group_size)
        counts.append(counters["stats"]["unique_graphs"])
    assert tokens(found) == tokens(expected)
    assert counts == sorted(set(counts))  # prompts are compiled, and decoding is
    generate(policy, PROMPTS[:2], Sampling(max_new_tokens=6), group_size=3)
    assert counters["stats"]["unique_graphs"] == counts[-1]  # whatever their number and length


def test_what_keeps_keys_and_values_in_a_cache_is_not_compiled(compiled, monkeypatch):
    policy = compiled()
    encoded = policy.encode(PROMPTS[:1])

    def refuse():
        raise AssertionError("a layer was given to the compiler")

    monkeypatch.setattr(layers, "compiling", refuse)
    ids = encoded[0].token_ids[None]
    policy.model.model.language_model(input_ids=ids, use_cache=True)  # as transformers' generate asks it
    with pytest.raises(AssertionError, match="given to the compiler"):
        policy.logprobs(encoded, COMPLETIONS[:1])


def test_a_cut_that_nobody_planned_is_named(make_policy, monkeypatch, caplog):
    torch._dynamo.reset()
    policy = make_policy()
    kind = type(policy.family.layers[0].mlp)
    inner = kind.forward

    def forward(mlp, x):
        torch._dynamo.graph_break("somebody looks at the hidden states")
        return inner(mlp, x)

    monkeypatch.setattr(kind, "forward", forward)
    with caplog.at_level("WARNING", logger="medrl"):
        policy.compile_layers(backend="eager")
    assert "in more pieces than they should be" in caplog.text and "somebody looks" in caplog.text


def test_a_compiler_that_fails_is_named_with_the_way_out(make_policy):
    def broken(*_):
        raise OSError("ld: cannot find -lcuda")

    torch._dynamo.reset()
    with pytest.raises(PolicyError, match=r"cannot find -lcuda[^.]*\. Set policy\.compile_layers=false"):
        make_policy().compile_layers(backend=broken)


def test_auto_compiles_on_a_gpu_where_it_can_and_says_so(monkeypatch, caplog):
    with caplog.at_level("INFO", logger="medrl"):
        assert not choose_compilation("auto", CPU) and not choose_compilation(False, CUDA)
        assert caplog.text == ""
        monkeypatch.setattr(layers, "has_triton", lambda: True)
        assert choose_compilation("auto", CUDA)
        assert "compiled (chosen by auto on cuda)" in caplog.text
        monkeypatch.setattr(layers, "has_triton", lambda: False)
        assert not choose_compilation("auto", CUDA)
        assert "not compiled (chosen by auto on cuda): Triton" in caplog.text


def test_what_is_asked_for_and_cannot_be_had_is_refused_by_name(monkeypatch):
    assert choose_compilation(True, CPU)
    monkeypatch.setattr(layers.shutil, "which", lambda _: None)
    with pytest.raises(PolicyError, match=r"a compiler \(g\+\+ or clang\+\+\) is missing.*compile_layers=false"):
        choose_compilation(True, CPU)
    monkeypatch.setattr(layers, "has_triton", lambda: True)
    with pytest.raises(PolicyError, match="gcc or cc or clang"):
        choose_compilation(True, CUDA)


@pytest.mark.slow
def test_kernels_made_for_a_cpu_are_exact_to_transformers_own_float32_steps(make_policy, compiled, encoded):
    """RMSNorm and rotary positions are in float32 whatever the weights are: another order of sums is 1e-6."""
    plain, policy = make_policy(), compiled(backend="inductor")
    for completions in (COMPLETIONS, *OTHERS):
        same(pass_through(policy, encoded, completions), pass_through(plain, encoded, completions), 1e-4, 1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-3), (torch.bfloat16, 5e-2)])
def test_on_a_gpu_compiled_layers_give_the_plain_gradient(make_policy, encoded, dtype, tolerance):
    torch._dynamo.reset()
    plain, policy = (on_gpu(make_policy, dtype) for _ in range(2))
    policy.compile_layers("auto")
    assert policy.compiled
    for completions in (COMPLETIONS, *OTHERS):
        found, expected = pass_through(policy, encoded, completions), pass_through(plain, encoded, completions)
        torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
        # All together: a bias of the keys has no gradient but rounding.
        ours, theirs = (
            torch.cat([g.flatten().double() for g in gradients.values()]) for _, gradients in (found, expected)
        )
        assert float((ours - theirs).norm() / theirs.norm()) < tolerance


@pytest.mark.gpu
def test_on_a_gpu_captured_steps_of_compiled_layers_write_what_plain_ones_write(make_policy):
    torch._dynamo.reset()
    plain, policy = (on_gpu(make_policy, torch.float32) for _ in range(2))
    policy.compile_layers()
    sampling = Sampling(temperature=0, max_new_tokens=12)
    assert tokens(generate(policy, PROMPTS, sampling)) == tokens(generate(plain, PROMPTS, sampling))


def on_gpu(make_policy, dtype: torch.dtype) -> Policy:
    policy = make_policy(dtype)
    policy.model.to("cuda")
    return Policy(policy.model, policy.processor)
