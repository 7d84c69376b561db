"""One GRPO step, timed: the code that trains, on a model of known shape with random weights."""

import resource
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from medrl.bench import baselines
from medrl.bench.limits import (
    Elapsed,
    Rates,
    Work,
    clock,
    measure_rates,
    median,
    phase_costs,
    release,
    require_context,
    say_turn,
)
from medrl.bench.models import Endless, ask, build_policy, find_size, make_examples, question
from medrl.errors import SettingsError
from medrl.grpo import GRPO, group_advantages
from medrl.phases import phase, timing
from medrl.policy.layers import Compilation
from medrl.policy.policy import Policy
from medrl.provenance import describe_machine
from medrl.rollout.collect import collect
from medrl.rollout.sampling import Sampling
from medrl.training.ahead import Ahead, choose_processes
from medrl.training.batches import pack_groups
from medrl.training.budget import Budget
from medrl.training.optim import AdamW, Optim
from medrl.training.settings import Training
from medrl.training.totals import Update
from medrl.training.update import update_policy
from medrl.types import Completion, Example, Score

PHASES = ("data", "vision", "prefill", "decode", "reference", "policy", "optimizer")
LEARNING_RATE = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class StepBench:
    """What to time."""

    model: str
    work: Work
    kl_coef: float = 0.04
    steps: int = 5
    """Timed steps; one more goes before them on a CPU, two on a GPU."""
    baseline: str | None = None
    attention: str = "auto"
    tokens_per_micro_batch: int | None = None
    checkpoint_activations: bool = False
    compile_layers: Compilation = "auto"
    kernels: Literal["auto"] | bool = "auto"


def bench_step(settings: StepBench, *, measured: Callable[[dict[str, Any]], object] = lambda _: None) -> dict[str, Any]:
    """Time steps, and a baseline on the same shapes. Returns what ``medrl bench step --json`` prints.

    ``measured`` is called with what is known before the baseline begins, which may take long or never end.
    """
    if settings.steps < 1:
        raise SettingsError(f"--steps is {settings.steps}, but at least one step must be timed")
    if settings.baseline is not None and settings.baseline not in baselines.BASELINES:
        known = ", ".join(baselines.BASELINES)
        raise SettingsError(f"there is no baseline {settings.baseline!r}: choose {known}, or leave --baseline out")
    size, work = find_size(settings.model), settings.work
    require_context(work)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    if settings.kernels is True and device == "cpu":
        raise SettingsError("--kernels is on, but fused kernels need a CUDA GPU, and there is none: give auto or off")
    rates = measure_rates(device, dtype)
    with tempfile.TemporaryDirectory(prefix="medrl-bench-") as folder:
        policy = build_policy(size, work.image_px, device, dtype, settings.attention)
        warm = 2 if device == "cuda" else 1
        text = question(policy.processor, work.prompt_tokens)
        examples = make_examples(Path(folder), work.prompts * (warm + settings.steps), work.image_px, text)
        found = _time_steps(policy, examples, settings, warm, device)
        described = _describe(settings, found, rates, policy, dtype)
        measured(described)
        if settings.baseline is not None:
            del policy
            release(device)
            other = baselines.BASELINES[settings.baseline](settings, examples, device, dtype)
            described["baseline"] = {
                "name": settings.baseline,
                "seconds_per_step": other.seconds,
                "cpu_seconds_per_step": other.cpu_seconds,
            }
            described["speedup"] = other.seconds / described["seconds_per_step"]
            described["cpu_speedup"] = other.cpu_seconds / described["cpu_seconds_per_step"]
    return described


@dataclass(frozen=True, slots=True)
class Timed:
    """Timed steps."""

    elapsed: list[Elapsed]
    phases: list[dict[str, float]]
    updates: list[Update]
    peak_bytes: int


def _time_steps(policy: Endless, examples: Sequence[Example], settings: StepBench, warm: int, device: str) -> Timed:
    if settings.checkpoint_activations:
        policy.checkpoint_activations()
    policy.kernels = settings.kernels
    policy.compile_layers(settings.compile_layers)
    if settings.kl_coef > 0:
        policy.freeze_reference()
    take_step = make_step(policy, settings)
    per_step, workers = settings.work.prompts, Training().data_workers
    batches = [examples[start : start + per_step] for start in range(0, len(examples), per_step)]
    turns = [[ask(example) for example in batch] for batch in batches]
    times, phases, updates = [], [], []
    with Ahead(policy, workers, processes=choose_processes("auto", workers, policy.device)) as ahead:
        ahead.start(turns[0])
        ahead.wait_for_processes()  # a run is longer than their start
        for number, batch in enumerate(batches):
            if number == warm and device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with clock(device) as elapsed, timing(exact=True) as spent:
                with phase("data"):
                    ahead.wait()
                ahead.start(turns[number + 1] if number + 1 < len(turns) else [])
                update = take_step(batch, number)
            say_turn("medrl", "step", number - warm, elapsed, of=settings.steps)
            if number >= warm:
                times.append(elapsed)
                phases.append(spent)
                updates.append(update)
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else _peak_resident_bytes()
    return Timed(times, phases, updates, peak)


def make_step(policy: Endless, settings: StepBench) -> Callable[[Sequence[Example], int], Update]:
    """(examples, step) -> one whole step: prompts, rollouts, rewards, update."""
    work = settings.work
    objective = GRPO(group_size=work.group, kl_coef=settings.kl_coef)
    sampling = Sampling(max_new_tokens=work.completion_tokens)
    optimizer = AdamW(policy.model.named_parameters(), Optim(lr=LEARNING_RATE))
    budget = Budget(policy, settings.tokens_per_micro_batch)

    def take_step(examples: Sequence[Example], step: int) -> Update:
        groups = collect(policy, examples, ask, some_reward, sampling, group_size=work.group, seed=0, step=step)
        batch = pack_groups(groups, group_advantages(groups.rewards))
        return update_policy(policy, batch, optimizer, objective, lr=LEARNING_RATE, tokens_per_micro_batch=budget)

    return take_step


def some_reward(example: Example, completion: Completion) -> Score:
    """Tells completions apart, so that no group is left out; what is learned does not matter here."""
    return Score(value=float(sum(completion.token_ids) % 97))


def _describe(settings: StepBench, found: Timed, rates: Rates, policy: Policy, dtype: torch.dtype) -> dict[str, Any]:
    size, work = find_size(settings.model), settings.work
    costs = phase_costs(size, work, kl=settings.kl_coef > 0, element_bytes=dtype.itemsize)
    limit = sum(cost.seconds(rates) for cost in costs.values())
    typical = median(found.elapsed)
    phases = {name: statistics.median(spent.get(name, 0.0) for spent in found.phases) for name in PHASES}
    gaps = [update.sampling_gap for update in found.updates if update.sampling_gap is not None]
    flops = sum(cost.flops for cost in costs.values())
    return {
        "seconds_per_step": typical.seconds,
        "cpu_seconds_per_step": typical.cpu_seconds,
        "seconds": [elapsed.seconds for elapsed in found.elapsed],
        "phases": {**phases, "other": max(0.0, typical.seconds - sum(phases.values()))},
        "tokens_per_s": work.rows * work.completion_tokens / typical.seconds,
        "peak_gb": found.peak_bytes / 1e9,
        "mfu": flops / (typical.seconds * rates.flops_per_s),
        "limit_seconds": limit,
        "fraction_of_limit": limit / typical.seconds,
        "limit_phases": {name: cost.seconds(rates) for name, cost in costs.items()},
        "sampling_gap": statistics.fmean(gaps),
        "device": device_name(dtype),
        "attention": policy.attention,
        "compiled": policy.compiled,
        "kernels": fused_parts(policy),
        "copy_gb_per_s": rates.bytes_per_s / 1e9,
        "matrix_tflops": rates.flops_per_s / 1e12,
        "model": settings.model,
        "prompts": work.prompts,
        "group": work.group,
        "image_px": work.image_px,
        "prompt_tokens": work.prompt_tokens,
        "completion_tokens": work.completion_tokens,
        "kl_coef": settings.kl_coef,
        "baseline": None,
        "speedup": None,
        "cpu_speedup": None,
        **describe_machine(),
    }


def fused_parts(policy: Policy) -> list[str]:
    """What went through fused kernels."""
    return [name for name, is_fused in (("head", policy.head_fused), ("decoding", policy.decodes_fused)) if is_fused]


def device_name(dtype: torch.dtype) -> str:
    """What the numbers were measured on."""
    if torch.cuda.is_available():
        return f"{torch.cuda.get_device_name()}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"
    threads = torch.get_num_threads()
    return f"CPU, {threads} threads, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"


def _peak_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
