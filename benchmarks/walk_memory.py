"""What a training step takes of a GPU's memory, counted on CUDA tensors that hold nothing: no GPU is needed.

    python benchmarks/walk_memory.py --model 2b --image-px 448 --prompts 8 --group 8 --completion-tokens 160

Every tensor of a real update is counted from when it is made until it is freed, layers not compiled. What the kernels
take for themselves, CUDA's context (about 0.5 GB) and what is lost between tensors come on top. A line for each number
of groups in a micro-batch:

    kept     after the forward pass, for the backward pass
    pass     at most during forward and backward pass of a micro-batch, with its gradients in bfloat16
    step     at most during a whole update: weights, reference, float32 masters, moments, sums of gradients, all of it
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from medrl.bench.limits import Work
from medrl.bench.memory import Layout, activations_per_patch, activations_per_token
from medrl.bench.models import Endless, Size, ask, build_policy, find_size, make_examples, question
from medrl.errors import SettingsError
from medrl.grpo import GRPO
from medrl.policy.policy import EncodedPrompt
from medrl.training.batches import TrainingGroup
from medrl.training.optim import AdamW, Optim
from medrl.training.update import update_policy
from medrl.types import Example

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from fake_cuda import FakeCuda  # pyright: ignore[reportMissingImports]

GB = 1e9


def main() -> None:
    words = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    words.add_argument("--model", default="2b")
    sizes = {"prompts": 8, "group": 8, "image-px": 448, "prompt-tokens": 80, "completion-tokens": 160}
    for name, value in sizes.items():
        words.add_argument(f"--{name}", type=int, default=value)
    words.add_argument("--groups", type=int, nargs="+", default=[1, 2, 4, 8], help="of a micro-batch")
    given = vars(words.parse_args())
    work = Work(**{name.replace("-", "_"): given[name.replace("-", "_")] for name in sizes})
    size = find_size(given["model"])
    for recomputed in (False, True):
        print(f"\ncheckpoint_activations: {str(recomputed).lower()}")
        with tempfile.TemporaryDirectory(prefix="medrl-walk-") as folder, FakeCuda() as gpu:
            walk(gpu, size, work, Path(folder), given["groups"], recomputed=recomputed)


def walk(gpu: FakeCuda, size: Size, work: Work, folder: Path, groups: list[int], *, recomputed: bool) -> None:
    policy = build_policy(size, work.image_px, "cuda", torch.bfloat16)
    weights = gpu.live
    policy.freeze_reference()
    if recomputed:
        policy.checkpoint_activations()
    examples = make_examples(folder, work.prompts, work.image_px, question(policy.processor, work.prompt_tokens))
    encoded = policy.encode([ask(example) for example in examples])
    tokens = len(encoded[0].token_ids) + work.group * (work.completion_tokens - 1)
    passes = [one_pass(gpu, policy, encoded[:count], work) for count in groups]
    optimizer = AdamW(policy.model.named_parameters(), Optim())
    update(policy, optimizer, examples[:1], work, tokens)  # moments are made
    state = gpu.live
    print(f"weights {weights / GB:.2f} GB; with reference, masters and moments {state / GB:.2f} GB")
    for count, (kept, most) in zip(groups, passes, strict=True):
        gpu.peak = gpu.live
        # Two micro-batches: the second finds the sums of the first.
        update(policy, optimizer, examples[: 2 * count], work, count * (tokens + work.patches))
        print(
            f"{count} groups, {count * tokens} tokens, {count * work.patches} patches: kept {kept / GB:.2f}, "
            f"pass {most / GB:.2f}, step {gpu.peak / GB:.2f} GB ({gpu.peak / 2**30:.1f} GiB)"
        )
    layout = Layout(checkpoint_activations=recomputed)
    planned = tokens * activations_per_token(size, layout) + work.patches * activations_per_patch(size, layout)
    print(f"bench/memory.py plans {planned / GB:.2f} GB kept for one group")


def one_pass(gpu: FakeCuda, policy: Endless, encoded: list[EncodedPrompt], work: Work) -> tuple[int, int]:
    """Bytes kept for the backward pass, and the most that both passes take."""
    before = gpu.peak = gpu.live
    scored = policy.logprobs(encoded, [completions(work)] * len(encoded))
    kept = gpu.live - before
    gpu.backward(scored.logprobs.sum())
    policy.model.zero_grad()
    return kept, gpu.peak - before


def update(policy: Endless, optimizer: AdamW, examples: list[Example], work: Work, budget: int) -> None:
    batch = tuple(
        TrainingGroup(
            prompt=ask(example),
            completions=tuple(map(tuple, completions(work))),
            advantages=(1.0, *[-1 / (work.group - 1)] * (work.group - 1)),
            sampling_logprobs=((-1.0,) * work.completion_tokens,) * work.group,
        )
        for example in examples
    )
    update_policy(policy, batch, optimizer, GRPO(group_size=work.group), lr=1e-6, tokens_per_micro_batch=budget)


def completions(work: Work) -> list[list[int]]:
    return [[5] * work.completion_tokens] * work.group


if __name__ == "__main__":
    try:
        main()
    except SettingsError as error:
        sys.exit(f"error: {error}")
