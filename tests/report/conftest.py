"""A made-up run with two evaluations, as training and evaluation would leave it."""

import math
import random
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

from medrl.evaluation.blind import blind_baselines
from medrl.evaluation.metrics import summarize
from medrl.files import write_json_atomically
from medrl.runs import Run, append_records
from medrl.types import LETTERS, EvalRecord, Example

N_EXAMPLES = 160
OPTIONS = ("Normal tissue", "Adenocarcinoma", "Squamous cell carcinoma", "Large cell carcinoma")


def make_examples(store: Path) -> list[Example]:
    generator = random.Random(0)
    (store / "images").mkdir(parents=True, exist_ok=True)
    examples = []
    for number in range(N_EXAMPLES):
        image = store / "images" / f"{number // 2:03}.png"
        x, y = generator.randrange(20, 60), generator.randrange(20, 50)
        if not image.exists():
            picture = Image.new("L", (96, 80))
            ImageDraw.Draw(picture).ellipse([10, 6, 86, 74], fill=70)
            ImageDraw.Draw(picture).ellipse([x, y, x + 14, y + 12], fill=210)
            picture.save(image)
        examples.append(
            Example(
                id=f"test-{number:04}",
                source="Made-up scans",
                images=(image,),
                question="What does the bright region in this scan most likely show?",
                options=OPTIONS[: 2 + 2 * (number % 2)],
                target=LETTERS[generator.randrange(2 + 2 * (number % 2))],
                modality=("CT", "Magnetic resonance imaging", "X-ray")[number % 3],
                question_type=("Disease diagnosis", "Anatomy identification")[number % 2],
            )
        )
    return examples


def make_evaluation(folder: Path, store: Path, name: str, skill: float, started: str, seed: int = 1) -> Path:
    """An evaluation whose model is right with probability ``skill``."""
    generator = random.Random(seed)
    examples = make_examples(store)
    records = []
    for example in examples:
        right = generator.random() < skill
        wrong = [letter for letter in LETTERS[: len(example.options)] if letter != example.target]
        answer = example.target if right else generator.choice([*wrong, None])
        reasoning = "The region is bright and well defined, with smooth borders and no sign of invasion. " * 3
        text = f"<think>{reasoning}</think>\n<answer>{answer}</answer>" if answer else reasoning
        records.append(
            EvalRecord(
                id=example.id,
                source=example.source,
                modality=example.modality,
                question_type=example.question_type,
                patient=None,
                images=(str(example.images[0].relative_to(store)),),
                question=example.question,
                options=example.options,
                mode="think",
                prompt_hash="0123456789abcdef",
                completion=text,
                finish_reason="stop" if answer else "length",
                answer=answer,
                target=example.target,
                correct=right,
                parts={"choice_correct": float(right), "well_formed": float(answer is not None)},
                tokens=len(text) // 5,
            )
        )
    append_records(folder, records)
    summary = {
        **summarize(records),
        "name": name,
        "model": "tiny-vlm",
        "mode": "think",
        "template": "think",
        "store": str(store),
        "store_fingerprint": "f" * 64,
        "train_store": None,
        "blind": [result.as_dict() for result in blind_baselines(examples[:40], examples)],
        "versions": {"medrl": "0.1.0", "torch": "2.13.0"},
        "machine": {"gpu": None, "cpu": "2 cores"},
        "seconds": 81.5,
        "started": started,
    }
    write_json_atomically(folder / "summary.json", summary)
    return folder


def make_run(path: Path, store: Path, skills: tuple[float, float] = (0.45, 0.85), n_steps: int = 120) -> Path:
    recipe = {"seed": 7, "policy": {"model": "tiny-vlm"}, "grpo": {"group_size": 8, "kl_coef": 0.04}, "steps": n_steps}
    run = Run.create(path, recipe, {"store_fingerprint": "a" * 64, "versions": {"torch": "2.13.0"}, "seconds": 4000})
    generator = random.Random(0)
    for step in range(n_steps):
        progress = 1 - math.exp(-step / 30)
        run.append_metrics(
            {
                "step": step,
                "reward": 0.6 + 1.2 * progress + generator.gauss(0, 0.1),
                "rewards/choice_correct/mean": 0.3 + 0.5 * progress + generator.gauss(0, 0.06),
                "rewards/well_formed/mean": min(1.0, 0.3 + 0.7 * progress),
                "completions/mean_length": 140 - 70 * progress + generator.gauss(0, 4),
                "frac_reward_zero_std": 0.1 + 0.5 * progress,
                "kl": 0.02 * progress + abs(generator.gauss(0, 0.002)),
                "entropy": 1.2 - 0.7 * progress,
                "grad_norm": 0.8 + generator.gauss(0, 0.1),
                "lr": 1e-6 * (1 - step / n_steps),
            }
        )
    (run.checkpoints / "step-000120").mkdir(parents=True)
    make_evaluation(path / "eval" / "before", store, "before", skills[0], "2026-11-01T10:00:00", seed=1)
    make_evaluation(path / "eval" / "after", store, "after", skills[1], "2026-11-01T12:00:00", seed=2)
    return path


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    return make_run(folder / "ct-demo", folder / "store")
