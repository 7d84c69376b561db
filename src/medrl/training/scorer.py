"""What an update asks of a policy, so that something else can take its place."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from medrl.policy.encoding import Encoder, Encodes
from medrl.policy.policy import EncodedPrompt, ScoredCompletions
from medrl.types import Prompt


class Scorer(Protocol):
    """What reads prompts and says how probable completions are."""

    @property
    def model(self) -> Any: ...

    @property
    def family(self) -> Any: ...

    @property
    def encoder(self) -> Encoder | None: ...

    @property
    def device(self) -> torch.device: ...

    def prepare(self, prompt: Prompt, encoder: Encodes) -> None: ...

    def encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]: ...

    def logprobs(
        self, encoded: Sequence[EncodedPrompt], completions: Any, *, temperature: float = 1.0
    ) -> ScoredCompletions: ...
