"""One of the processes of tests/training/test_distributed.py: trains as its plan says, and writes down what it got."""

import json
import os
import signal
import sys
from pathlib import Path

import torch

from medrl.errors import MedrlError, NonFiniteError
from medrl.grpo import GRPO
from medrl.policy.policy import Policy
from medrl.rollout.sampling import Sampling
from medrl.stopping import Stopped
from medrl.training import distributed
from medrl.training.distributed import Scale
from medrl.training.optim import Optim
from medrl.training.train import Training, train
from medrl.types import Example, Score

torch.set_num_threads(1)


def lively(example, completion):
    """The reward of tests/training/conftest.py."""
    right = f"<answer>{example.target}</answer>" in completion.text
    noise = sum(completion.token_ids) % 7 / 7
    return Score(value=float(right) + noise * 0.5, parts={"noise": noise}, answer=example.target if right else None)


def broken(example, completion):
    """Not finite for one example; a completion of no tokens is the check of the right answers before the start."""
    if example.id == "example-5" and completion.token_ids:
        return Score(value=float("nan"))
    return lively(example, completion)


def stopping(example, completion):
    """Ask one rank to stop, in the middle of the third step."""
    if completion.token_ids:
        scored.append(example.id)
    if len(scored) == 5 and distributed.rank() == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    return lively(example, completion)


scored: list[str] = []
REWARDS = {"lively": lively, "broken": broken, "stopping": stopping}


def examples_from(folder: Path) -> list[Example]:
    rows = json.loads((folder / "examples.json").read_text())
    as_given = [{name: tuple(v) if isinstance(v, list) else v for name, v in row.items()} for row in rows]
    return [Example(**{**row, "images": tuple(Path(image) for image in row["images"])}) for row in as_given]


def run(job: dict, folder: Path) -> dict:
    policy = Policy.load(job["model"], dtype=job.get("dtype", "float32"), device="cpu")
    settings = Training(
        **{
            **job["settings"],
            "sampling": Sampling(**job["settings"]["sampling"]),
            "optim": Optim(**job["settings"]["optim"]),
        }
    )
    options = {"settings": settings, "scale": Scale(**job.get("scale", {})), "quiet": True, "resume": "auto"}
    reward = REWARDS[job.get("reward", "lively")]
    try:
        train(policy, examples_from(folder), reward, GRPO(**job["grpo"]), out=job["out"], **options)
    except NonFiniteError as error:
        return {"error": str(error), "fingerprint": policy.fingerprint()}
    except Stopped:
        return {"stopped": True}
    return {"fingerprint": policy.fingerprint()}


def mistake() -> str:
    """What a rank raises when the code of the second one is wrong."""
    try:
        distributed.gather(lambda: {"CT": 0}["CT" if distributed.first() else "PET"])
    except (MedrlError, KeyError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


def main() -> None:
    folder = Path(sys.argv[1])
    jobs = json.loads((folder / "jobs.json").read_text())
    with distributed.joined():
        told = distributed.gather(lambda: distributed.rank())
        spread = distributed.spread("abcde", lambda mine: [letter.upper() for letter in mine])
        results = {
            "told": told,
            "spread": spread,
            "mistake": mistake(),
            **{name: run(job, folder) for name, job in jobs.items()},
        }
        (folder / f"rank-{distributed.rank()}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main()
    sys.stderr.flush()
    os._exit(0)  # torch's threads may abort while the interpreter is taken down; all that is tested has been written
