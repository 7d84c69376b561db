"""The settings of a run that do not belong to one objective."""

from typing import Literal

from pydantic import Field

from medrl.rollout.sampling import Sampling
from medrl.settings import Settings
from medrl.training.ahead import Processes
from medrl.training.curriculum import Curriculum
from medrl.training.optim import Optim
from medrl.types import Mode


class Training(Settings):
    """The settings of a run that do not belong to one objective."""

    steps: int = Field(default=500, ge=1)
    """Optimizer steps."""
    prompts_per_step: int = Field(default=4, ge=1)
    """Prompts (groups) per step; the papers: 4."""
    mode: Mode = "think"
    """Form of completion asked for."""
    template: str | None = None
    """Prompt wording by name; None takes the mode's default."""
    sampling: Sampling = Sampling()
    optim: Optim = Optim()
    curriculum: Curriculum = Curriculum()
    tokens_per_micro_batch: int | None = Field(default=None, ge=1)
    """Tokens that go through the model together; patches of a vision tower that learns count as parts of a token. None
    finds it on a GPU, and takes 4096 on a CPU. Changes memory and speed, not the result."""
    data_workers: int = Field(default=4, ge=1)
    """How many decode, resize and tokenize the next step's prompts. Changes speed, not the result."""
    data_processes: Processes = "auto"
    """Whether these are processes, or threads of this one; auto: processes on a GPU. Each takes half a gigabyte of main
    memory. Changes speed, not the result."""
    save_every: int = Field(default=100, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_checkpoints: int = Field(default=2, ge=1)
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """On non-finite rewards, losses or gradients: stop the run, or skip the step and log it to quarantine.jsonl."""
    max_skips: int = Field(default=3, ge=1)
    """Steps that may be left out in the whole run; the next one ends it."""
    seed: int = 42
    deterministic: bool = False
    """Take kernels that give the same bits each time, where torch has them; a CPU does so anyway, a GPU gets slower."""
