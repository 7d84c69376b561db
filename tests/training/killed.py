"""A process that starts trainings, kills them with SIGKILL at random moments, starts them again, until they are done.

python killed.py MODEL OUT KILLS SEED      prints one JSON line: {"kills": 30, "runs": 7, "steps_at_kill": [...]}

It forks: what is imported is imported once, and each training is a process of its own that can be killed for good.
Everything below OUT/whole is the run that nobody kills, OUT/0, OUT/1, ... are those that were.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.rollout.sampling import Sampling
from medrl.training.optim import Optim
from medrl.training.settings import Training
from medrl.training.train import train
from medrl.types import LETTERS, Example, Score

OBJECTIVE = GRPO(group_size=2, kl_coef=0.04)
SETTINGS = Training(
    steps=8,
    prompts_per_step=2,
    mode="no_think",
    template="plain-no-think",
    sampling=Sampling(max_new_tokens=4),
    optim=Optim(lr=1e-3),
    save_every=1,
    tokens_per_micro_batch=1,
)


def reward(example: Example, completion: Any) -> Score:
    """Draws from every global generator: its dice are part of the run."""
    right = f"<answer>{example.target}</answer>" in completion.text
    if not completion.token_ids:
        return Score(value=float(right), answer=example.target)
    dice = random.random() + np.random.random() + float(torch.rand(()))  # noqa: NPY002
    value = sum(completion.token_ids) % 7 / 7 + 0.1 * dice
    return Score(value=value, parts={"dice": dice}, answer=example.target if right else None)


def make_examples(image: Path) -> list[Example]:
    return [
        Example(
            id=f"example-{i}",
            source="noise",
            images=(image,),
            question="Which modality was used?" + " Look again." * (i % 3),
            options=("CT", "MRI", "ultrasound"),
            target=LETTERS[i % 3],
        )
        for i in range(5)
    ]


def child(model: str, image: Path, out: Path) -> int:
    """Start or continue a run in a process of its own; returns its id."""
    process = os.fork()
    if process == 0:
        train(
            Policy.load(model),
            make_examples(image),
            reward,
            OBJECTIVE,
            out=out,
            settings=SETTINGS,
            resume="auto",
            quiet=True,
        )
        os._exit(0)
    return process


def exit_code(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def main(model: str, out: str, kills: str, seed: str) -> None:
    torch.set_num_threads(1)
    folder, draw = Path(out), random.Random(int(seed))
    image = next(folder.glob("*.png"))
    started = time.monotonic()
    assert exit_code(child(model, image, folder / "whole")) == 0
    usual_s = time.monotonic() - started
    killed, runs, steps = 0, 0, []
    while killed < int(kills):
        run = folder / str(runs)
        code = -signal.SIGKILL
        while code == -signal.SIGKILL:
            process = child(model, image, run)
            if killed < int(kills):
                time.sleep(draw.uniform(0, usual_s))
                os.kill(process, signal.SIGKILL)
            code = exit_code(process)
            if code == -signal.SIGKILL:
                killed += 1
                log = run / "metrics.jsonl"
                steps.append(log.read_bytes().count(b"\n") if log.exists() else 0)
        assert code == 0, f"run {runs} ended with {code}"
        runs += 1
    print(json.dumps({"kills": killed, "runs": runs, "steps_at_kill": steps}))  # noqa: T201


if __name__ == "__main__":
    main(*sys.argv[1:])
