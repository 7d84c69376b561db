"""What saves time or memory changes no number: each saving against the same policy without it, in float64."""

import peft
import pytest
import torch
from transformers import Qwen2VLForConditionalGeneration

from medrl.errors import CheckpointError, SettingsError
from medrl.policy.loading import PolicySettings
from medrl.policy.lora import Lora
from medrl.policy.naive import naive_logprobs
from medrl.policy.policy import Policy, load_policy
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling
from medrl.types import Prompt

COMPLETIONS = [[[20, 21, 22, 23], [30]], [[40, 41], [50, 51, 52]]]
LORA = Lora(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def encoded(policy, noise):
    return [policy.encode_turn("a", "abc", [noise(1)]), policy.encode_turn("b", "c", [noise(2), noise(3)])]


def pass_through(policy: Policy, encoded) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities, and the gradient of every parameter that has one."""
    policy.model.zero_grad()
    scored = policy.logprobs(encoded, COMPLETIONS)
    weights = torch.linspace(-1, 2, scored.logprobs.numel(), dtype=torch.float64).view_as(scored.logprobs)
    (scored.logprobs * weights).sum().backward()
    return scored.logprobs.detach(), {n: p.grad for n, p in policy.model.named_parameters() if p.grad is not None}


def adapt(policy: Policy, seed: int = 3) -> Policy:
    """Adapters that do something, as after some training."""
    policy.add_lora(LORA)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return policy


@pytest.fixture
def adapted(make_policy) -> Policy:
    return adapt(make_policy())


class Calls:
    """Counts the calls of a module's forward pass."""

    def __init__(self, monkeypatch, module) -> None:
        self.count = 0
        inner = module.forward

        def forward(*args, **kwargs):
            self.count += 1
            return inner(*args, **kwargs)

        monkeypatch.setattr(module, "forward", forward)


def test_recomputed_layers_give_every_gradient_bit_by_bit(make_policy, encoded, monkeypatch):
    plain, policy = make_policy(), make_policy()
    policy.checkpoint_activations()
    ran = [Calls(monkeypatch, layer.mlp) for layer in policy.family.layers + policy.family.vision_blocks]
    expected, gradients = pass_through(plain, encoded)
    found, ours = pass_through(policy, encoded)
    assert torch.equal(found, expected)
    assert ours.keys() == gradients.keys()
    assert all(torch.equal(ours[name], gradients[name]) for name in gradients)
    assert [calls.count for calls in ran] == [2] * len(ran)  # forward, and again in backward
    with torch.no_grad():
        policy.logprobs(encoded, COMPLETIONS)
    assert [calls.count for calls in ran] == [3] * len(ran)


def test_recomputed_layers_write_what_plain_ones_write(make_policy):
    prompts = [Prompt(id=str(n), text="abc " * n, images=(), mode="think") for n in range(3)]
    plain, policy = make_policy(), make_policy()
    policy.checkpoint_activations()
    assert generate(policy, prompts, Sampling(max_new_tokens=6)) == generate(plain, prompts, Sampling(max_new_tokens=6))


def test_a_frozen_tower_has_no_graph_and_sees_each_image_once(make_policy, noise, monkeypatch):
    plain, policy = make_policy(), make_policy()
    for each in (plain, policy):
        each.family.vision.requires_grad_(False)
    encoded = [policy.encode_turn(str(n), "abc", [noise(n)]) for n in range(2)]
    calls = Calls(monkeypatch, policy.family.vision)
    embedded = policy.embed_prompts(encoded)
    assert policy._features.of(policy.family, [encoded[0].pixels], [encoded[0].grids]).requires_grad is False
    assert embedded.requires_grad  # through the words
    expected, gradients = pass_through(plain, encoded)
    found, ours = pass_through(policy, encoded)
    assert calls.count == 1
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert ours.keys() == gradients.keys() and not any("visual" in name for name in ours)
    torch.testing.assert_close(ours, gradients, rtol=1e-9, atol=1e-12)
    # One more image: only that one is looked at.
    policy.embed_prompts([*encoded, policy.encode_turn("new", "abc", [noise(9)])])
    assert calls.count == 2


def test_a_tower_that_changed_looks_again(make_policy, encoded):
    policy = make_policy()
    policy.family.vision.requires_grad_(False)
    before = policy.embed_prompts(encoded)
    with torch.no_grad():
        policy.family.vision.merger.mlp[0].bias.add_(1.0)
    assert not torch.equal(policy.embed_prompts(encoded), before)


def test_a_frozen_tower_is_shared_with_the_reference_and_a_trained_one_is_not(make_policy, encoded, monkeypatch):
    policy = make_policy()
    policy.family.vision.requires_grad_(False)
    policy.freeze_reference()
    assert policy.reference.family.vision is policy.family.vision
    calls = Calls(monkeypatch, policy.family.vision)
    with torch.no_grad():
        expected = policy.logprobs(encoded, COMPLETIONS).logprobs
        assert torch.equal(policy.reference.logprobs(encoded, COMPLETIONS).logprobs, expected)
    assert calls.count == 1
    trained = make_policy()
    trained.freeze_reference()
    assert trained.reference.family.vision is not trained.family.vision


def test_fresh_adapters_change_nothing_and_are_all_that_learns(make_policy, encoded):
    plain, policy = make_policy(), make_policy()
    policy.add_lora(LORA)
    expected, _ = pass_through(plain, encoded)
    found, gradients = pass_through(policy, encoded)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    # Two layers, seven matrices, A and B of each.
    assert len(gradients) == 2 * 7 * 2 and all(".lora_" in name for name in gradients)


def test_the_reference_of_adapters_is_the_model_without_them(make_policy, adapted, encoded):
    with torch.no_grad():
        start = make_policy().logprobs(encoded, COMPLETIONS).logprobs
        torch.testing.assert_close(adapted.reference.logprobs(encoded, COMPLETIONS).logprobs, start, rtol=1e-12, atol=0)
        moved = adapted.logprobs(encoded, COMPLETIONS).logprobs
    assert float((moved - start).abs().max()) > 0.01
    assert adapted.reference.model is adapted.model  # nothing was loaded or copied


def test_a_reference_pass_between_forward_and_backward_leaves_the_gradient_alone(adapted, encoded):
    _, expected = pass_through(adapted, encoded)
    expected = {name: gradient.clone() for name, gradient in expected.items()}
    adapted.model.zero_grad()
    scored = adapted.logprobs(encoded, COMPLETIONS)
    with torch.no_grad():
        adapted.reference.logprobs(encoded, COMPLETIONS)
    weights = torch.linspace(-1, 2, scored.logprobs.numel(), dtype=torch.float64).view_as(scored.logprobs)
    (scored.logprobs * weights).sum().backward()
    for name, parameter in adapted.model.named_parameters():
        assert (parameter.grad is None) == (name not in expected)
        assert parameter.grad is None or torch.equal(parameter.grad, expected[name])


def test_gradients_of_adapters_are_the_naive_ones(adapted, encoded):
    _, ours = pass_through(adapted, encoded)
    ours = {name: gradient.clone() for name, gradient in ours.items()}
    adapted.model.zero_grad()
    rows = naive_logprobs(adapted, encoded, COMPLETIONS)
    longest = max(len(row) for row in rows)
    weights = torch.linspace(-1, 2, len(rows) * longest, dtype=torch.float64).view(len(rows), longest)
    torch.stack([(row * weights[n, : len(row)]).sum() for n, row in enumerate(rows)]).sum().backward()
    for name, parameter in adapted.model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-5, atol=1e-7)


def test_saved_adapters_are_merged_for_all_and_kept_apart_for_the_next_step(adapted, make_policy, encoded, tmp_path):
    adapted.save(tmp_path / "saved")
    with torch.no_grad():
        expected = adapted.logprobs(encoded, COMPLETIONS).logprobs
        merged = Policy.load(tmp_path / "saved", dtype="float64").logprobs(encoded, COMPLETIONS).logprobs
        torch.testing.assert_close(merged, expected, rtol=1e-6, atol=0)
        resumed = make_policy()
        resumed.add_lora(LORA)
        resumed.restore(tmp_path / "saved")
        assert torch.equal(resumed.logprobs(encoded, COMPLETIONS).logprobs, expected)


def test_peft_reads_the_saved_adapters(adapted, make_model, tmp_path):
    adapted.save(tmp_path / "saved")
    theirs = peft.PeftModel.from_pretrained(make_model(), str(tmp_path / "saved" / "adapter"))
    merged = theirs.merge_and_unload()
    saved = Qwen2VLForConditionalGeneration.from_pretrained(tmp_path / "saved", dtype=torch.float64)
    for (name, ours), (_, other) in zip(saved.named_parameters(), merged.named_parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-6, atol=1e-9, msg=name)


def test_matrices_that_the_layers_do_not_have_are_named_with_those_they_have(make_policy):
    expected = r"policy\.lora\.matrices has foo, qkv, but .* have down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj"
    with pytest.raises(SettingsError, match=expected):
        make_policy().add_lora(Lora(matrices=("q_proj", "qkv", "foo")))  # qkv: of the vision tower alone


def test_adapters_of_another_shape_are_refused(adapted, make_policy, tmp_path):
    adapted.save(tmp_path / "saved")
    other = make_policy()
    other.add_lora(Lora(rank=2))
    with pytest.raises(CheckpointError, match=r"not those of this model.*policy\.lora"):
        other.restore(tmp_path / "saved")


def test_a_recipe_can_ask_for_all_of_it(adapted, tmp_path):
    adapted.save(tmp_path / "base")
    settings = PolicySettings(
        model=str(tmp_path / "base"), dtype="float32", lora=Lora(rank=2), checkpoint_activations=True, attention="dense"
    )
    policy = load_policy(settings)
    assert policy.attention == "dense"
    learning = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    assert learning and all(".lora_" in name for name in learning)
    again = load_policy(settings)  # the start of a run does not depend on what was drawn before it
    assert policy.fingerprint() == again.fingerprint()
