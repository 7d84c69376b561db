"""What every training method starts from, beside its own objective."""

from dataclasses import dataclass

from medrl.policy.policy import Policy
from medrl.rollout.collect import Ask, Generate
from medrl.rollout.sampling import Sampling
from medrl.rollout.served import Server
from medrl.types import Reward


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """The parts of a run that a method works with."""

    policy: Policy
    ask: Ask
    reward: Reward
    sampling: Sampling
    seed: int
    prompts_per_step: int
    server: Server | None = None
    """Writes the completions; None: the policy does, in this process."""

    @property
    def generator(self) -> Generate | None:
        return None if self.server is None else self.server.generate
