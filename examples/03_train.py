"""Four GRPO steps on real images: where everything goes, and what a step reports. A real run has hundreds."""

import tempfile
from pathlib import Path

import medrl
from medrl.data.demo import build_examples
from medrl.rewards import choice_correct, weighted, well_formed

out = Path(tempfile.mkdtemp(prefix="medrl-"))
train_set = build_examples("train", 24, seed=0, folder=out / "images")

run = medrl.train(
    medrl.Policy.load("demo-base"),
    train_set,
    weighted((1.0, choice_correct), (1.0, well_formed)),
    medrl.GRPO(group_size=4, kl_coef=0.0),
    out=out / "run",
    steps=4,
    prompts_per_step=4,
    template="plain",
    sampling=medrl.Sampling(max_new_tokens=40),
    optim=medrl.Optim(lr=3e-4),
    quiet=True,
)

for row in run.metrics():
    print(
        f"step {row['step']}: reward {row['reward']:.2f}, right {row['rewards/choice_correct/mean']:.0%}, "
        f"well-formed {row['rewards/well_formed/mean']:.0%}, {row['time/step_s']:.1f} s"
    )
print(f"run folder: {run.path} ({', '.join(sorted(path.name for path in run.path.iterdir()))})")
