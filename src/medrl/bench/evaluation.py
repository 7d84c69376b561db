"""Greedy evaluation, timed: items per second, against transformers' generate in batches of 64."""

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from medrl.bench.baselines import generate_with_transformers
from medrl.bench.limits import Elapsed, Work, clock, median, require_context, say_turn
from medrl.bench.models import Endless, ask, build_policy, find_size, make_examples, question
from medrl.bench.step import device_name, fused_parts
from medrl.evaluation.answer import complete_reading_ahead, reading_ahead
from medrl.policy.layers import Compilation
from medrl.provenance import describe_machine
from medrl.rollout.sampling import Sampling
from medrl.rollout.scheduler import Tally
from medrl.types import Prompt

BASELINE, BASELINE_BATCH = "transformers generate", 64


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalBench:
    """What to time."""

    model: str = "25m"
    items: int = 64
    batch_size: int = 64
    image_px: int = 224
    prompt_tokens: int = 80
    completion_tokens: int = 96
    repeats: int = 3
    baseline: bool = True
    compile_layers: Compilation = "auto"


def bench_eval(settings: EvalBench, *, measured: Callable[[dict[str, Any]], object] = lambda _: None) -> dict[str, Any]:
    """Time greedy evaluation, reading and resizing of images included. Returns what ``medrl bench eval`` prints.

    ``measured`` is called with what is known before the baseline begins.
    """
    shapes = Work(
        prompts=settings.items,
        group=1,
        image_px=settings.image_px,
        prompt_tokens=settings.prompt_tokens,
        completion_tokens=settings.completion_tokens,
    )
    require_context(shapes)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    policy = build_policy(find_size(settings.model), settings.image_px, device, dtype)
    sampling = Sampling(temperature=0, max_new_tokens=settings.completion_tokens)
    with (
        tempfile.TemporaryDirectory(prefix="medrl-bench-") as folder,
        reading_ahead(policy) as ahead,
    ):
        policy.compile_layers(settings.compile_layers, to_train=False)
        text = question(policy.processor, settings.prompt_tokens)
        examples = make_examples(Path(folder), settings.items, settings.image_px, text)
        prompts = [ask(example) for example in examples]
        ahead.wait_for_processes()  # an evaluation is longer than their start

        tally = Tally()

        def ours(some: Sequence[Prompt]) -> list[tuple[int, ...]]:
            tally.decode_steps = 0
            batches = complete_reading_ahead(policy, some, sampling, ahead, at_once=settings.batch_size, tally=tally)
            found = {one.number: one.completions[0].token_ids for batch in batches for one in batch}
            return [found[number] for number in range(len(some))]

        def theirs(some: Sequence[Prompt]) -> list[tuple[int, ...]]:
            written = []
            for start in range(0, len(some), BASELINE_BATCH):
                encoded = policy.encode(some[start : start + BASELINE_BATCH])
                out = generate_with_transformers(policy, encoded, 1, settings.completion_tokens, sample=False)
                written += [tuple(row) for row in out.tolist()]
            return written

        ours_took, answers = _time("medrl", policy, prompts, settings.batch_size, ours, settings.repeats, device)
        described = {
            "items_per_s": len(prompts) / ours_took.seconds,
            "seconds": ours_took.seconds,
            "cpu_seconds": ours_took.cpu_seconds,
            "device": device_name(dtype),
            "model": settings.model,
            "items": settings.items,
            "batch_size": settings.batch_size,
            "image_px": settings.image_px,
            "prompt_tokens": settings.prompt_tokens,
            "completion_tokens": settings.completion_tokens,
            "decode_steps": tally.decode_steps,
            "compiled": policy.compiled,
            "kernels": fused_parts(policy),
            "baseline": None,
            "speedup": None,
            "cpu_speedup": None,
            "same_tokens": None,
            **describe_machine(),
        }
        measured(described)
        if settings.baseline:
            other, expected = _time(BASELINE, policy, prompts, BASELINE_BATCH, theirs, settings.repeats, device)
            described["baseline"] = {
                "name": BASELINE,
                "items_per_s": len(prompts) / other.seconds,
                "cpu_seconds": other.cpu_seconds,
            }
            described["speedup"] = other.seconds / ours_took.seconds
            described["cpu_speedup"] = other.cpu_seconds / ours_took.cpu_seconds
            described["same_tokens"] = statistics.fmean(a == b for a, b in zip(answers, expected, strict=True))
    return described


def _time(
    who: str,
    policy: Endless,
    prompts: Sequence[Prompt],
    warm_with: int,
    answer: Callable[[Sequence[Prompt]], list[tuple[int, ...]]],
    repeats: int,
    device: str,
) -> tuple[Elapsed, list[tuple[int, ...]]]:
    """What all prompts take, median, after ``warm_with`` of them to warm up; and what was answered."""
    times, answers = [], []
    for number in range(-1, repeats):
        policy.forget_prompts()
        with clock(device) as elapsed:
            answers = answer(prompts[:warm_with] if number < 0 else prompts)
        say_turn(who, "round", number, elapsed, of=repeats)
        times.append(elapsed)
    return median(times[1:]), answers
