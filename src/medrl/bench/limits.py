"""What a step must cost: arithmetic and memory traffic alone, from shapes, for the rates this device was measured at.

Shared prompts, every completion as long as asked; multiply-adds count twice. The formulas are those of docs/engine.md.
"""

import gc
import logging
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from medrl.bench.models import CONTEXT, Size, merged_side
from medrl.errors import SettingsError
from medrl.policy.products import product

log = logging.getLogger(__name__)
PATCH_VALUES, PATCH_PX, MERGED = 3 * 2 * 14 * 14, 14, 4
ADAM_BYTES = 28
"""Per parameter: gradient, float32 weight and two moments read, weight and moments written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The shapes of a step."""

    prompts: int
    group: int
    image_px: int
    prompt_tokens: int
    """Text tokens of a prompt."""
    completion_tokens: int

    @property
    def patches(self) -> int:
        """Of one image."""
        return (merged_side(self.image_px) // PATCH_PX) ** 2

    @property
    def prompt_length(self) -> int:
        return self.prompt_tokens + self.patches // MERGED

    @property
    def rows(self) -> int:
        return self.prompts * self.group


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What the device can do, measured."""

    bytes_per_s: float
    """Copying a large tensor: bytes read plus bytes written."""
    flops_per_s: float
    """Multiplying large square matrices in the precision of the model."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Floating-point operations and bytes that cannot be avoided."""

    flops: float
    bytes: float

    def seconds(self, rates: Rates) -> float:
        return max(self.flops / rates.flops_per_s, self.bytes / rates.bytes_per_s)


def require_context(work: Work) -> None:
    """Refuse what the bench's models cannot hold. Raises ``SettingsError`` naming the options."""
    tokens = work.prompt_length + work.completion_tokens
    if tokens > CONTEXT:
        raise SettingsError(
            f"--image-px {work.image_px} ({work.patches // MERGED} tokens), --prompt-tokens {work.prompt_tokens} and "
            f"--completion-tokens {work.completion_tokens} make {tokens} tokens, but its models hold {CONTEXT}: lower "
            "one of them"
        )


def layer_weights(size: Size) -> int:
    """Weights in the matrices of the language model's layers."""
    width = size.hidden // size.heads
    attention = 2 * size.hidden**2 + 2 * size.hidden * size.kv_heads * width
    return size.layers * (attention + 3 * size.hidden * size.intermediate)


def head_weights(size: Size) -> int:
    return size.vocabulary * size.hidden


def parameters(size: Size) -> int:
    """All weights of matrices, the embedding once where it is tied."""
    return layer_weights(size) + head_weights(size) * (1 if size.tied else 2) + _tower(size) + _merger(size)


def vision_flops(size: Size, patches: int) -> float:
    """Forward pass of one image."""
    attention = 4 * size.vision_layers * size.vision_hidden * patches**2
    return 2 * patches * _tower(size) + attention + 2 * (patches // MERGED) * _merger(size)


def stream_flops(size: Size, work: Work) -> float:
    """Forward pass of the language model over all packed groups, head on completion tokens only."""
    p, c, g = work.prompt_length, work.completion_tokens, work.group
    keys = p * (p + 1) / 2 + g * (c * p + c * (c + 1) / 2)
    tokens = work.prompts * (p + g * c)
    attention = 4 * size.layers * size.hidden * work.prompts * keys
    return 2 * layer_weights(size) * tokens + attention + 2 * head_weights(size) * work.rows * c


def step_costs(size: Size, work: Work, *, kl: bool, element_bytes: int) -> dict[str, Cost]:
    """What each phase of a step must cost."""
    p, c = work.prompt_length, work.completion_tokens
    keys = p * (p + 1) / 2
    images = work.prompts * vision_flops(size, work.patches)
    prompt_pass = work.prompts * (2 * layer_weights(size) * p + 4 * size.layers * size.hidden * keys)
    forward = images + stream_flops(size, work)
    costs = {
        "prefill": Cost(images + prompt_pass, 0.0),
        "decode": decode_cost(size, work, element_bytes),
        "policy": Cost(3 * forward, 0.0),
        "optimizer": Cost(0.0, ADAM_BYTES * parameters(size)),
    }
    return {**costs, "reference": Cost(forward, 0.0)} if kl and c else costs


def phase_costs(size: Size, work: Work, *, kl: bool, element_bytes: int) -> dict[str, Cost]:
    """The same by the phases that a step is timed in: all forward passes of the vision tower are ``vision``."""
    costs = step_costs(size, work, kl=kl, element_bytes=element_bytes)
    images = work.prompts * vision_flops(size, work.patches)
    passes = [name for name in ("prefill", "reference", "policy") if name in costs]
    without = {name: Cost(costs[name].flops - images, costs[name].bytes) for name in passes}
    return {**costs, **without, "vision": Cost(len(passes) * images, 0.0)}


def decode_cost(size: Size, work: Work, element_bytes: int) -> Cost:
    """Every step reads the weights once, each prompt's keys and values once, and each row's own."""
    weights = layer_weights(size) + head_weights(size)
    steps = work.completion_tokens
    per_token = 2 * size.layers * size.kv_heads * (size.hidden // size.heads)
    own = work.rows * steps * (steps - 1) / 2
    cached = per_token * (work.prompts * work.prompt_length * steps + own)
    attended = work.rows * (work.prompt_length * steps + steps * (steps + 1) / 2)
    flops = 2 * weights * work.rows * steps + 4 * size.layers * size.hidden * attended
    return Cost(flops, element_bytes * (weights * steps + cached))


def _tower(size: Size) -> int:
    return size.vision_layers * 12 * size.vision_hidden**2 + PATCH_VALUES * size.vision_hidden


def _merger(size: Size) -> int:
    wide = MERGED * size.vision_hidden
    return wide * wide + wide * size.hidden


def measure_rates(device: str, dtype: torch.dtype) -> Rates:
    """Copy bandwidth and matrix rate, each the best of several runs."""
    large = device == "cuda"
    source = torch.empty((1 << 30) if large else (1 << 27), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = _best(lambda: target.copy_(source), device)
    side = 8192 if large else 1024
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return Rates(
        bytes_per_s=2 * source.nbytes / seconds,
        flops_per_s=2 * side**3 / _best(lambda: product(a, b), device),
    )


def _best(work: Callable[[], object], device: str, runs: int = 8) -> float:
    times = []
    for _ in range(runs):
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


@dataclass(slots=True)
class Elapsed:
    """Of one timed piece of work."""

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    """Of all threads of this process: what to compare on a machine that others use at the same time."""


@contextmanager
def clock(device: str) -> Iterator[Elapsed]:
    """Time what is inside; the numbers are there when it has ended."""
    elapsed = Elapsed()
    synchronize(device)
    start, cpu_start = time.perf_counter(), time.process_time()
    yield elapsed
    synchronize(device)
    elapsed.seconds, elapsed.cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start


def say_turn(who: str, kind: str, number: int, elapsed: Elapsed, *, of: int) -> None:
    """One line for whoever waits; turns before 0 warm up."""
    turn = f"{kind} {number + 1} of {of}" if number >= 0 else "warm-up"
    log.info("%s, %s: %.3g s", who, turn, elapsed.seconds)


def median(times: Sequence[Elapsed]) -> Elapsed:
    """Of seconds and of processor seconds, each for itself."""
    return Elapsed(statistics.median(t.seconds for t in times), statistics.median(t.cpu_seconds for t in times))


def synchronize(device: str) -> None:
    """Wait for the GPU, where there is one."""
    if device == "cuda":
        torch.cuda.synchronize()


def release(device: str) -> None:
    """Give back what nobody names any more: parts of a model refer to each other, so their weights outlive its name."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
