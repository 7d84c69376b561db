"""What packing saves on a CPU, and how fast rollouts are, on the tiny model: `make bench`.

Log-probabilities and gradients of G completions of one prompt: packed (image and prompt once, in one stream) against
naive (each completion behind its own image and prompt, one forward pass each). Seconds are medians of five after one
warm-up; both give the same numbers, which the script checks first.
"""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from medrl.policy.naive import naive_logprobs
from medrl.policy.policy import EncodedPrompt, Policy
from medrl.policy.tiny import build_model, train_processor
from medrl.rollout.engine import generate
from medrl.rollout.sampling import Sampling
from medrl.types import Prompt

GROUP_SIZES = (1, 2, 4, 8, 16, 32)
COMPLETION_TOKENS = 24
REPEATS = 5
QUESTION = "Which modality is this?\nA) CT\nB) MRI\nC) Ultrasound\nReason in <think>...</think>, then give the letter."

Completions = Sequence[Sequence[Sequence[int]]]


def main() -> None:
    torch.manual_seed(0)
    processor = train_processor([QUESTION] * 10, vocab_size=400)
    policy = Policy(build_model(processor), processor)
    encoded = [policy.encode_turn("bench", QUESTION, [Image.new("RGB", (112, 112), (90, 60, 30))])]
    console = Console(file=sys.stdout, highlight=False)
    console.print(
        f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"prompt {len(encoded[0].token_ids)} tokens, completions {COMPLETION_TOKENS}; median of {REPEATS}"
    )
    console.print(scoring_table(policy, encoded))
    console.print(rollout_table(policy))


def scoring_table(policy: Policy, encoded: Sequence[EncodedPrompt]) -> Table:
    table = Table("completions (G)", "packed, s", "naive, s", "naive / packed", title="Log-probabilities and gradients")
    for size in GROUP_SIZES:
        drawn = torch.randint(20, 200, (size, COMPLETION_TOKENS))
        completions = [drawn.tolist()]
        check_agreement(policy, encoded, completions)
        packed = median_seconds(lambda c=completions: step(policy, lambda: policy.logprobs(encoded, c).logprobs.sum()))
        naive = median_seconds(
            lambda c=completions: step(policy, lambda: torch.cat(naive_logprobs(policy, encoded, c)).sum())
        )
        table.add_row(str(size), f"{packed:.3f}", f"{naive:.3f}", f"{naive / packed:.1f}")
    return table


def rollout_table(policy: Policy) -> Table:
    table = Table(
        "completions (G)", "seconds", "tokens per second", title="Rollouts of 8 prompts, up to 40 tokens each"
    )
    prompts = [Prompt(id=str(number), text=QUESTION, images=(), mode="think") for number in range(8)]
    for size in (1, 4, 8, 16):
        tokens: list[int] = []

        def roll(size: int = size, tokens: list[int] = tokens) -> None:
            groups = generate(policy, prompts, Sampling(max_new_tokens=40), group_size=size)
            tokens.append(sum(len(completion.token_ids) for group in groups for completion in group))

        seconds = median_seconds(roll)
        table.add_row(str(size), f"{seconds:.3f}", f"{tokens[-1] / seconds:.0f}")
    return table


def step(policy: Policy, logprobs: Callable[[], torch.Tensor]) -> None:
    """One forward and backward pass."""
    logprobs().backward()
    policy.model.zero_grad(set_to_none=True)


def check_agreement(policy: Policy, encoded: Sequence[EncodedPrompt], completions: Completions) -> None:
    with torch.no_grad():
        packed = policy.logprobs(encoded, completions).logprobs.flatten()
        naive = torch.cat(naive_logprobs(policy, encoded, completions))
    torch.testing.assert_close(packed, naive, rtol=1e-4, atol=1e-4)


def median_seconds(call: Callable[[], None]) -> float:
    call()  # warm-up
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    main()
