"""Makes a golden checkpoint: python make_golden.py FOLDER weights|adapters

A version whose checkpoints differ adds one per kind under golden/VERSION/ and never changes the earlier ones
(test_golden.py). Random weights, a width of 16, and a run that was killed after two of its four steps.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from medrl.grpo import GRPO
from medrl.policy.lora import Lora
from medrl.policy.policy import Policy
from medrl.policy.tiny import build_model, train_processor
from medrl.rollout.sampling import Sampling
from medrl.runs import Run
from medrl.training.checkpoint import latest_checkpoint
from medrl.training.optim import Optim
from medrl.training.train import Training, train
from medrl.types import LETTERS, Example, Score

OBJECTIVE = GRPO(group_size=2, kl_coef=0.04)
SETTINGS = Training(
    steps=4, prompts_per_step=2, mode="no_think", template="plain-no-think", sampling=Sampling(max_new_tokens=4),
    optim=Optim(lr=1e-3), save_every=2, keep_checkpoints=1, seed=5,
)  # fmt: skip


class Killed(BaseException):
    """The end of the process."""


def make_examples(folder: Path) -> list[Example]:
    """Five questions about images of noise, the same ones for ever."""
    folder.mkdir(parents=True, exist_ok=True)
    examples = []
    for i in range(5):
        pixels = np.random.default_rng(i).integers(0, 256, (28, 28, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"golden-{i}.png")
        examples.append(
            Example(
                id=f"golden-{i}",
                source="noise",
                images=(folder / f"golden-{i}.png",),
                question="Which modality was used?" + " Look again." * (i % 3),
                options=("CT", "MRI", "ultrasound"),
                target=LETTERS[i % 3],
            )
        )
    return examples


def reward(example: Example, completion) -> Score:
    right = f"<answer>{example.target}</answer>" in completion.text
    if not completion.token_ids:
        return Score(value=float(right), answer=example.target)
    noise = sum(completion.token_ids) % 7 / 7
    return Score(value=noise, parts={"noise": noise}, answer=example.target if right else None)


def load(folder: Path, kind: str) -> Policy:
    """The policy that the run in ``folder`` trains, at its start."""
    policy = Policy.load(folder / "base")
    if kind == "adapters":
        policy.add_lora(Lora(rank=1, alpha=2.0, matrices=("q_proj", "down_proj")))
    return policy


def main(folder: Path, kind: str) -> None:
    torch.set_num_threads(1)
    processor = train_processor(["CT"], vocab_size=272, image_px=28)
    sizes = {"layers": 1, "heads": 1, "kv_heads": 1, "vision_layers": 1, "vision_heads": 1}
    model = build_model(processor, hidden=16, intermediate=16, vision_hidden=8, context_tokens=256, **sizes)
    Policy(model, processor).save(folder / "base")
    inner = Run.append_metrics

    def killed_in_step_2(self, row):
        if row["step"] == 2:
            raise Killed
        inner(self, row)

    Run.append_metrics = killed_in_step_2  # type: ignore[method-assign]
    policy = load(folder, kind)
    with tempfile.TemporaryDirectory() as images, contextlib.suppress(Killed):
        train(policy, make_examples(Path(images)), reward, OBJECTIVE, out=folder / "run", settings=SETTINGS, quiet=True)
    restored = load(folder, kind)
    checkpoint = latest_checkpoint(folder / "run" / "checkpoints")
    assert checkpoint is not None
    restored.restore(checkpoint)
    facts = {"fingerprint": restored.fingerprint(), "made_by": "tests/training/make_golden.py"}
    (folder / "expected.json").write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
