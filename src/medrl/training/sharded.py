"""The training pass on weights that lie in pieces on all ranks (FSDP2), beside a whole policy that samples.

    learner = Sharded(policy)                                        float32 pieces, computed in the policy's precision
    optimizer = ShardedAdamW(learner, settings)                      steps the pieces, then writes them into the policy

Rollouts need all weights at every token, at another pace on each rank; so the policy stays whole in its own precision,
and what is large beside it (float32 weights, gradients, two moments: 16 bytes a weight) is divided. Checkpoints are
those of one process, so a run may continue on any number of ranks.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from medrl.errors import CheckpointError, SettingsError
from medrl.policy.encoding import Encoder, Encodes
from medrl.policy.lora import has_lora
from medrl.policy.policy import EncodedPrompt, Policy, ScoredCompletions
from medrl.training.batches import MicroBatch
from medrl.training.distributed import first, gathered, world_size
from medrl.training.optim import AdamW, Optim
from medrl.types import Prompt


class Sharded:
    """FSDP2 stand-in for the policy in updates.

    Every pass is a collective: all ranks must make the same number.
    """

    def __init__(self, policy: Policy) -> None:
        if has_lora(policy.model):
            raise SettingsError(
                "scale.strategy is fsdp, but policy.lora trains so few weights that there is nothing to divide: "
                "set scale.strategy to ddp, or train without policy.lora"
            )
        if policy.compiled:
            raise SettingsError(
                "scale.strategy fsdp cannot be used with policy.compile_layers=true: turn one of them off"
            )
        self.policy = policy
        self.half = policy.family.head.dtype == torch.bfloat16
        self.inner = Policy(copy.deepcopy(policy.model), policy.processor, attention=policy.attention)
        self.inner.kernels = policy.kernels
        mesh = init_device_mesh(policy.device.type, (world_size(),))
        precision = MixedPrecisionPolicy(
            param_dtype=policy.family.head.dtype if self.half else None,
            reduce_dtype=torch.float32 if self.half else None,
            cast_forward_inputs=False,  # what flows between layers has the precision that it has in one process
        )
        self.root: Any = _Pass(self.inner)
        family = self.inner.family
        for module in (*family.layers, *family.vision_blocks, self.root):  # a layer at a time is whole in float32
            if self.half:
                module.float()
            fully_shard(module, mesh=mesh, mp_policy=precision)
        for module in self.root.modules():
            if isinstance(module, FSDPModule):
                # A sum, not a mean: the weights of a step's loss are already those of all ranks together.
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    @property
    def model(self) -> Any:
        return self.inner.model

    @property
    def family(self) -> Any:
        return self.inner.family

    @property
    def encoder(self) -> Encoder:
        return self.policy.encoder

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def reference(self) -> Policy:
        return self.policy.reference

    def prepare(self, prompt: Prompt, encoder: Encodes) -> None:
        self.policy.prepare(prompt, encoder)

    def encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        return self.policy.encode(prompts)

    def logprobs(
        self, encoded: Sequence[EncodedPrompt], completions: Any, *, temperature: float = 1.0
    ) -> ScoredCompletions:
        """As ``Policy.logprobs``; all ranks at once, each on its own completions."""
        logprobs, entropy, mask = self.root(encoded, completions, temperature)
        return ScoredCompletions(logprobs=logprobs, entropy=entropy, completion_mask=mask)


class _Pass(nn.Module):
    """Wraps scoring in one forward, so that FSDP keeps the root parameters gathered throughout."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.model = policy.model
        self._policy = (policy,)

    def forward(self, encoded: Any, completions: Any, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
        scored = self._policy[0].logprobs(encoded, completions, temperature=temperature)
        return scored.logprobs, scored.entropy, scored.completion_mask


class ShardedAdamW(AdamW):
    """AdamW over the pieces; after each step the whole policy has the new weights, rounded to its precision."""

    def __init__(self, learner: Sharded, settings: Optim) -> None:
        self.learner = learner
        learner.root.reshard()
        super().__init__(learner.model.named_parameters(), settings)

    def sum_over_ranks(self) -> None:
        """The backward pass has done it."""

    def step(self, lr: float) -> float:
        """As ``AdamW.step``; all ranks at once."""
        self.learner.root.reshard()
        grad_norm = super().step(lr)
        self.publish()
        return grad_norm

    @torch.no_grad()
    def publish(self) -> None:
        """Write the pieces into the whole policy."""
        whole = dict(self.learner.policy.model.named_parameters())
        for weight in self.weights:
            whole[weight.name].copy_(gathered(weight.parameter))

    def state_dict(self) -> tuple[dict[str, Tensor], dict[str, int]]:
        """As one process would give it; whole tensors on rank 0, empty ones elsewhere."""
        tensors, steps = super().state_dict()
        if self.learner.half:
            tensors |= {f"{weight.name}.master": weight.parameter.detach() for weight in self.weights}
        kept = {}
        for name, tensor in tensors.items():  # one after the other: together they would not fit
            whole = gathered(tensor)
            kept[name] = whole.cpu() if first() else torch.empty(0)
        return kept, steps

    @torch.no_grad()
    def load_state_dict(self, tensors: Mapping[str, Tensor], steps: Mapping[str, int]) -> None:
        """Continue where any number of processes stopped; the policy's own weights are restored before this."""
        tensors = dict(tensors)
        whole = dict(self.learner.policy.model.named_parameters())
        for weight in self.weights:
            name = f"{weight.name}.master"
            if self.learner.half and name not in tensors:
                raise CheckpointError(
                    f"the checkpoint has no float32 weights of {weight.name}: resume with the policy.dtype and the "
                    "freeze_vision that the run was started with"
                )
            master = tensors.pop(name) if self.learner.half else whole[weight.name]
            weight.parameter.copy_(_cut_like(master.detach(), weight.parameter))
        by_name = {weight.name: weight for weight in self.weights}
        pieces = {
            name: _cut_like(tensor, by_name[owner].parameter)
            if (owner := name.rpartition(".")[0]) in by_name
            else tensor
            for name, tensor in tensors.items()
        }
        super().load_state_dict(pieces, steps)
        self.publish()


def idle_pass(micro_batch: MicroBatch) -> MicroBatch:
    """A pass that takes part and adds nothing: for a rank that has fewer groups than another."""
    return replace(micro_batch, weights=torch.zeros_like(micro_batch.weights), entropy_weight=0.0)


def _cut_like(whole: Tensor, piece: Tensor) -> Tensor:
    assert isinstance(piece, DTensor)
    return distribute_tensor(
        whole.to(piece.device, piece.dtype), piece.device_mesh, piece.placements, src_data_rank=None
    )
