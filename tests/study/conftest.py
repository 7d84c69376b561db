"""A study of a few seconds: random weights, pictures of noise, two domains."""

from pathlib import Path

import pytest
import torch
import yaml

from medrl.data.store import write_store

TRAINING = {
    "steps": 3,
    "prompts_per_step": 2,
    "mode": "no_think",
    "template": "plain-no-think",
    "sampling": {"max_new_tokens": 6},
    "optim": {"lr": 1.0e-3},
    "save_every": 1,
    "keep_checkpoints": 1,
}


@pytest.fixture(scope="session")
def mini(make_policy, make_examples, tmp_path_factory) -> Path:
    """Folder with a model, a train and a test store, and study.yaml: 6 trainings and 7 evaluations."""
    folder = tmp_path_factory.mktemp("mini")
    make_policy(torch.float32).save(folder / "model")
    for side, n in (("train", 8), ("test", 12)):
        examples = make_examples(folder / f"{side}-images", n, prefix=side)
        write_store(folder / side, examples, source="noise", license="none")
    study = {
        "name": "mini",
        "data": {"train": str(folder / "train"), "test": str(folder / "test")},
        "axes": {"modality": {}, "all": {}},
        "policy": {"model": str(folder / "model"), "dtype": "float32"},
        "recipe": {"grpo": {"group_size": 2, "kl_coef": 0.0}, "training": TRAINING},
        "methods": {"sft": {"method": "sft"}, "grpo": {}},
        "zero_shot": {"zero-shot": {"mode": "no_think", "template": "plain-no-think"}},
        "seeds": [0],
        "evaluation": {"batch_size": 5},
    }
    (folder / "study.yaml").write_text(yaml.safe_dump(study))
    return folder
