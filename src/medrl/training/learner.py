"""What an update trains: the whole policy (one process, DDP), or pieces of it on every rank (FSDP)."""

from medrl.errors import SettingsError
from medrl.policy.policy import Policy
from medrl.training import distributed
from medrl.training.distributed import Scale
from medrl.training.optim import AdamW
from medrl.training.released import ReleasedTurns
from medrl.training.scorer import Scorer
from medrl.training.settings import Training
from medrl.training.sharded import Sharded, ShardedAdamW


def make_learner(
    policy: Policy, scorer: Policy | ReleasedTurns, settings: Training, scale: Scale
) -> tuple[Scorer, AdamW]:
    """What an update takes as the policy, and the optimizer of its weights."""
    if scale.offload_reference:
        policy.offload_reference()
    if scale.strategy == "fsdp" and distributed.world_size() > 1:
        if isinstance(scorer, ReleasedTurns):
            raise SettingsError("sft.emulate cannot be used with scale.strategy fsdp: set it to ddp")
        if settings.tokens_per_micro_batch is None and policy.device.type == "cuda":
            raise SettingsError(
                "scale.strategy fsdp needs training.tokens_per_micro_batch: all ranks run together, so none can probe "
                "alone what fits; 'medrl plan' proposes a number"
            )
        learner = Sharded(policy)
        return learner, ShardedAdamW(learner, settings.optim)
    return scorer, AdamW(policy.model.named_parameters(), settings.optim)
