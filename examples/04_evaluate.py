"""Evaluate a small model on real held-out images: accuracy with its interval, beside baselines that see no image."""

import tempfile
from pathlib import Path

import medrl
from medrl.data.demo import build_examples

out = Path(tempfile.mkdtemp(prefix="medrl-"))
train_set = build_examples("train", 40, seed=0, folder=out / "images")
test_set = build_examples("test", 16, seed=0, folder=out / "images")

evaluation = medrl.evaluate(
    medrl.Policy.load("demo-base"),
    test_set,
    out=out / "base",
    train_examples=train_set,
    template="plain",
    max_new_tokens=40,
    quiet=True,
)


def show(name: str, accuracy: dict) -> None:
    print(f"{name:24} {accuracy['value']:.0%} (95 % interval {accuracy['low']:.0%} to {accuracy['high']:.0%})")


show("the model", evaluation.summary["accuracy"])
for baseline in evaluation.summary["blind"]:
    show(f"blind: {baseline['name']}", baseline["accuracy"])
print(f"one completion: {evaluation.records[0].completion}")
print(f"records: {out / 'base' / 'records.jsonl'}")
