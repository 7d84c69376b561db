"""How an evaluation asks and decodes."""

from typing import Any

from pydantic import Field, model_validator

from medrl.rollout.sampling import Sampling
from medrl.settings import Settings
from medrl.training.ahead import Processes
from medrl.types import Mode


class EvalSettings(Settings):
    """How an evaluation asks and decodes."""

    mode: Mode = "think"
    template: str | None = None
    max_new_tokens: int = Field(default=256, ge=1)
    batch_size: int = Field(default=32, ge=1)
    """Prompts decoded together, or requests under way at once; changes speed, and the answers by no more than rounding.
    """
    option_probs: bool = True
    """Keep how probable each option's letter was; one more pass over prompt and completion. A server is not asked."""
    samples: int = Field(default=1, ge=1)
    """Completions per question; of several, the majority's answer counts, and pass@k is computed."""
    temperature: float | None = Field(default=None, ge=0)
    """None: 0 (greedy) for one completion, 1 for several."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    seed: int = 0
    """Sampling seed; unused in greedy decoding."""
    data_workers: int | None = Field(default=None, ge=1)
    """How many decode, resize and tokenize the next questions; None: one per core, at most 8. Changes only speed."""
    data_processes: Processes = "auto"
    """Whether these are processes, or threads of this one; auto: processes on a GPU. Changes only speed."""

    @model_validator(mode="after")
    def _several_are_drawn(self) -> "EvalSettings":
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(
                f"samples is {self.samples} and temperature is 0: greedy completions are all the same; "
                "raise the temperature or ask for one"
            )
        return self

    @property
    def sampling(self) -> Sampling:
        """What draws the tokens."""
        usual = 0.0 if self.samples == 1 else 1.0
        return Sampling(
            temperature=usual if self.temperature is None else self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
        )

    def describe_sampling(self) -> dict[str, Any] | None:
        """What decides the draws; None when nothing is drawn."""
        sampling = self.sampling
        if sampling.temperature == 0:
            return None
        return {
            "samples": self.samples,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "seed": self.seed,
        }
