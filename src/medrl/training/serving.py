"""Completions by a server, for all ranks: rank 0 hands the weights over, each asks for its share of the prompts."""

from pathlib import Path

from medrl.policy.policy import Policy
from medrl.rollout.sampling import Sampling
from medrl.rollout.served import Rollouts, Server
from medrl.training import distributed

FOLDER = "served"
"""Below the run folder: the weights that the server was given last."""


def make_server(rollout: Rollouts | None, sampling: Sampling, out: Path) -> Server | None:
    """The server a recipe asks for; None where the training process writes the completions itself."""
    if rollout is None or rollout.endpoint is None:
        return None
    return Server(rollout, sampling, out / FOLDER)


def hand_over(server: Server, policy: Policy, step: int) -> None:
    """Give the server the weights that ``step`` begins with. Every step does so before it asks, the first of a resumed
    run too: a server may have been started again meanwhile."""
    server.given = Path(distributed.from_first(lambda: str(server.give(policy, step))))
