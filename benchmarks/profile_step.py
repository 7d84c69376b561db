"""What a GRPO step is made of: its kernels, by the time they take, phase by phase. Works on a CPU, too.

python benchmarks/profile_step.py --model 2b --prompts 8 --image-px 448 --completion-tokens 160
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from medrl.bench.limits import Work
from medrl.bench.models import ask, build_policy, find_size, make_examples, question
from medrl.bench.step import StepBench, make_step, some_reward
from medrl.errors import SettingsError
from medrl.rollout.collect import collect
from medrl.rollout.sampling import Sampling

ROWS = 30


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    words.add_argument("--model", default="25m")
    words.add_argument("--compile-layers", default="auto", choices=["auto", "on", "off"])
    sizes = {"prompts": 4, "group": 8, "image-px": 224, "prompt-tokens": 80, "completion-tokens": 64}
    for name, value in sizes.items():
        words.add_argument(f"--{name}", type=int, default=value)
    given = vars(words.parse_args())
    work = Work(**{name.replace("-", "_"): given[name.replace("-", "_")] for name in sizes})
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = build_policy(
        find_size(given["model"]), work.image_px, device, torch.bfloat16 if device == "cuda" else torch.float32
    )
    policy.compile_layers({"on": True, "off": False}.get(given["compile_layers"], "auto"))
    policy.freeze_reference()
    step = make_step(policy, StepBench(model=given["model"], work=work))
    sampling = Sampling(max_new_tokens=work.completion_tokens)
    with tempfile.TemporaryDirectory(prefix="medrl-bench-") as folder:
        examples = make_examples(
            Path(folder), 2 * work.prompts, work.image_px, question(policy.processor, work.prompt_tokens)
        )
        warm, timed = examples[: work.prompts], examples[work.prompts :]
        for number in range(2):
            step(warm, number)
        show(
            "rollouts",
            lambda: collect(policy, timed, ask, some_reward, sampling, group_size=work.group, seed=0, step=2),
        )
        show("a whole step", lambda: step(timed, 3))


def show(name: str, work) -> None:
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities) as seen:
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    print(f"\n{name}\n{seen.key_averages().table(sort_by=by, row_limit=ROWS, max_name_column_width=70)}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except SettingsError as error:
        sys.exit(f"error: {error}")
