"""A reference whose layers wait in main memory says what it said before."""

import pytest
import torch

from medrl.data.prompts import make_prompt
from medrl.errors import PolicyError
from medrl.policy.layers import keep_in_main_memory
from medrl.policy.lora import Lora

COMPLETIONS = [((20, 21, 2), (30, 2)), ((40, 41, 42, 2), (50, 51, 2))]


def test_a_reference_that_waits_in_main_memory_scores_the_same(make_policy, make_examples, tmp_path):
    policy = make_policy()
    policy.freeze_reference()
    encoded = policy.encode([make_prompt(example, template="plain") for example in make_examples(tmp_path, 2)])
    with torch.no_grad():
        before = policy.reference.logprobs(encoded, COMPLETIONS).logprobs
        policy.offload_reference()
        waiting = [parameter.data_ptr() for parameter in policy.reference.model.parameters()]
        after = policy.reference.logprobs(encoded, COMPLETIONS).logprobs
    assert torch.equal(after, before)
    assert [parameter.data_ptr() for parameter in policy.reference.model.parameters()] == waiting
    # The policy itself is where it was, and still learns.
    policy.logprobs(encoded, COMPLETIONS).logprobs.sum().backward()
    assert all(parameter.grad is not None for parameter in policy.family.layers[0].parameters())


@pytest.mark.gpu
def test_a_layer_is_on_the_device_only_while_it_computes():
    layer, seen = torch.nn.Linear(2, 2).requires_grad_(False), []
    keep_in_main_memory([layer], torch.device("cuda"))
    layer.register_forward_pre_hook(lambda *_: seen.append(layer.weight.device.type))
    assert layer(torch.zeros(1, 2, device="cuda")).device.type == "cuda"
    assert seen == ["cuda"] and layer.weight.device.type == "cpu"


def test_a_tower_that_policy_and_reference_share_stays(make_policy):
    policy = make_policy()
    policy.family.vision.requires_grad_(False)
    policy.freeze_reference()
    policy.offload_reference()
    block = policy.family.vision_blocks[0]
    assert block is policy.reference.family.vision_blocks[0] and not block._forward_pre_hooks
    assert all(layer._forward_pre_hooks for layer in policy.reference.family.layers)


def test_with_adapters_there_is_nothing_to_offload(make_policy):
    policy = make_policy()
    policy.add_lora(Lora(rank=2))
    with pytest.raises(PolicyError, match="adapters"):
        policy.offload_reference()
