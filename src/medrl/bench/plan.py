"""``medrl plan``: what a recipe takes of memory and time, before anything is booked.

For GPUs that are not here: from shapes, and from a step measured on such a card. For this machine: a few real steps.
"""

import json
import math
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from medrl.bench.limits import Rates, Work, parameters, step_costs
from medrl.bench.memory import KEPT_FREE, Layout, activations_per_token, cure, memory, peak, trained_weights
from medrl.bench.models import SIZES, Size
from medrl.errors import RunError, SettingsError
from medrl.grpo import GRPO
from medrl.policy.loading import resolve_model
from medrl.settings import load_settings
from medrl.training.batches import advantages_are_all
from medrl.training.recipe import Recipe, run_settings

HUB = {"Qwen/Qwen2-VL-2B-Instruct": "2b", "Qwen/Qwen2-VL-7B-Instruct": "7b"}
"""Shapes that are known without a download."""
ASSUMED = {"share_of_limit": 0.25, "matrix_tflops": 790.0, "copy_gb_per_s": 3000.0}
"""Where no measured step is given: an H100's rates, and a quarter of what they allow."""
LINK_BYTES_PER_S = 100e9
"""Between GPUs, assumed."""
GB, NOMINAL_GB = 1e9, 2**30
"""What is counted, measured and printed; what cards are sold by: an "80 GB" H100 holds 85.5e9 bytes."""
ELEMENT_BYTES = {"float32": 4, "float64": 8, "bfloat16": 2, "float16": 2}
PROMPT_TOKENS = 120
WARM_UP = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What is to be booked."""

    gpus: int
    gpu_gb: float
    """As cards are sold: 80 for an H100."""
    measured: Path | None = None
    """What ``medrl bench step --json`` printed on such a card."""
    image_px: int | None = None
    prompt_tokens: int = PROMPT_TOKENS
    completion_tokens: int | None = None
    """Mean length; None: every completion as long as is allowed."""


def plan(recipe: Path, overrides: Sequence[str], cluster: Cluster) -> dict[str, Any]:
    """What ``medrl plan --gpus N --json`` prints. Raises ``SettingsError`` for what cannot be known from the recipe."""
    settings = load_settings(Recipe, recipe, overrides)
    size = size_of(settings.policy.model)
    rows = _group_size(settings)
    whole = Work(
        prompts=settings.training.prompts_per_step,
        group=rows,
        image_px=cluster.image_px or image_px_of(settings),
        prompt_tokens=cluster.prompt_tokens,
        completion_tokens=cluster.completion_tokens or settings.training.sampling.max_new_tokens,
    )
    work = _share(whole, cluster.gpus)
    layout = layout_of(settings, cluster.gpus)
    parts, room = memory(size, work, layout), (1 - KEPT_FREE) * cluster.gpu_gb * NOMINAL_GB
    fits = peak(parts) <= room
    cured = None if fits else cure(size, work, layout, room)
    chosen = layout if cured is None else cured[1]
    step_s, phases, basis = seconds_per_step(size, work, chosen, settings, cluster)
    return {
        "model": settings.policy.model,
        "weights": parameters(size),
        "trained_weights": trained_weights(size, layout),
        "gpus": cluster.gpus,
        "gpu_gb": cluster.gpu_gb,
        "memory_gb": {name: amount / GB for name, amount in parts.items()},
        "peak_gb": peak(parts) / GB,
        "room_gb": room / GB,
        "fits": fits,
        "set": [] if cured is None else cured[0],
        "peak_with_that_gb": peak(memory(size, work, chosen)) / GB if fits or cured else None,
        "tokens_per_micro_batch": _tokens_that_fit(size, work, chosen, room) if fits or cured else None,
        "idle_gpus": max(0, cluster.gpus - whole.prompts),
        "seconds_per_step": step_s,
        "phases": phases,
        "tokens_per_s": whole.rows * whole.completion_tokens / step_s,
        "steps": settings.training.steps,
        "hours": settings.training.steps * step_s / 3600,
        "basis": basis,
    }


def size_of(model: str) -> Size:
    """The shapes of a model: of a folder with a config.json, of ``demo-base``, or of a hub id that is known."""
    if model in HUB:
        return SIZES[HUB[model]]
    file = Path(resolve_model(model)) / "config.json"
    if not file.is_file():
        raise SettingsError(
            f"the shapes of {model} are not known: give a folder with its config.json as policy.model, or one of "
            f"{', '.join(HUB)}"
        )
    config = json.loads(file.read_text(encoding="utf-8"))
    text, vision = config.get("text_config", config), config["vision_config"]
    return Size(
        hidden=text["hidden_size"],
        layers=text["num_hidden_layers"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        intermediate=text["intermediate_size"],
        vocabulary=text["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
        vision_hidden=vision.get("embed_dim", vision["hidden_size"]),
        vision_layers=vision["depth"],
        vision_heads=vision["num_heads"],
    )


def image_px_of(settings: Recipe) -> int:
    """Side of the largest square image that the recipe lets through."""
    if settings.policy.max_pixels is not None:
        return math.isqrt(settings.policy.max_pixels)
    folder = Path(resolve_model(settings.policy.model))
    for name in ("processor_config.json", "preprocessor_config.json"):
        if (folder / name).is_file():
            found = json.loads((folder / name).read_text(encoding="utf-8"))
            size = found.get("image_processor", found).get("size", {})
            if "longest_edge" in size:
                return math.isqrt(size["longest_edge"])
    raise SettingsError(
        f"how large images become is not known for {settings.policy.model}: set policy.max_pixels, or give --image-px"
    )


def layout_of(settings: Recipe, gpus: int) -> Layout:
    """How the recipe lies in memory."""
    policy, objective = settings.policy, settings.grpo
    return Layout(
        gpus=gpus,
        element_bytes=ELEMENT_BYTES[policy.dtype],
        fsdp=settings.scale.strategy == "fsdp" and gpus > 1,
        reference=settings.method == "grpo" and objective.kl_coef > 0,
        offload_reference=settings.scale.offload_reference,
        lora=policy.lora is not None,
        freeze_vision=policy.freeze_vision or policy.lora is not None,
        checkpoint_activations=policy.checkpoint_activations,
        tokens_per_micro_batch=settings.training.tokens_per_micro_batch,
        samples=settings.method != "sft" and settings.rollout.endpoint is None,
    )


def seconds_per_step(
    size: Size, work: Work, layout: Layout, settings: Recipe, cluster: Cluster
) -> tuple[float, dict[str, float], dict[str, Any]]:
    """Seconds of a step, by phase, and what they rest on."""
    rates, share, source = _rates(cluster.measured)
    costs = step_costs(size, work, kl=layout.reference, element_bytes=layout.element_bytes)
    if settings.method == "sft":
        costs = {name: cost for name, cost in costs.items() if name not in ("prefill", "decode")}
    phases = {name: cost.seconds(rates) / share for name, cost in costs.items()}
    phases["optimizer"] *= trained_weights(size, layout) / parameters(size) / (layout.gpus if layout.fsdp else 1)
    if layout.checkpoint_activations:
        phases["policy"] *= 4 / 3
    if layout.gpus > 1:
        # Gradients are added up once (twice their bytes cross a link), pieces are gathered and added in every pass.
        rounds = 1.5 if layout.fsdp else 1.0
        phases["communication"] = rounds * 2 * 4 * trained_weights(size, layout) / LINK_BYTES_PER_S
    basis = {
        "rates": source,
        "share_of_limit": share,
        "link_gb_per_s": LINK_BYTES_PER_S / 1e9 if layout.gpus > 1 else None,
        "completion_tokens": work.completion_tokens,
        "prompt_tokens": work.prompt_tokens,
        "image_px": work.image_px,
    }
    return sum(phases.values()), phases, basis


def measure(recipe: Path, overrides: Sequence[str] = (), *, steps: int = 6, quiet: bool = False) -> dict[str, Any]:
    """What ``medrl plan --json`` prints without ``--gpus``: the time of the whole run, from its first steps on this
    machine."""
    if steps <= WARM_UP:
        raise SettingsError(f"--steps is {steps}, but the first one warms up: give at least {WARM_UP + 1}")
    settings = load_settings(Recipe, recipe, overrides)
    planned = settings.training
    first = planned.model_copy(update={"steps": steps, "save_every": steps})
    with tempfile.TemporaryDirectory(prefix="medrl-plan-") as folder:
        run = run_settings(
            settings.model_copy(update={"training": first}),
            out=Path(folder) / "run",
            quiet=quiet,
            folders=(Path(), recipe.parent),
        )
        rows, seconds = run.metrics(), run.provenance["seconds"]
        saved = sum(file.stat().st_size for file in run.checkpoints.rglob("*") if file.is_file())
    timed = rows[WARM_UP:]
    names = sorted({name for row in timed for name in row if name.startswith("time/")})
    phases = {name[5:-2]: median(row[name] for row in timed) for name in names}
    now = phases.pop("step")
    # A group whose completions all earn the same costs no update, and there are ever more of them: how soon, who knows.
    idle = isinstance(settings.objective, GRPO) and advantages_are_all(settings.objective)
    least = now - phases["update"] if idle else now
    typical = (now + least) / 2
    # What a run does besides steps is, nearly all of it, to save.
    save_s = max(0.0, seconds - sum(row["time/step_s"] for row in rows))
    saves = planned.steps // planned.save_every + (planned.steps % planned.save_every > 0)
    tokens = median(row["tokens_per_s"] * row["time/step_s"] for row in timed)

    def hours(step_s: float) -> float:
        return (planned.steps * step_s + saves * save_s) / 3600

    return {
        "model": settings.policy.model,
        "steps": planned.steps,
        "measured_steps": len(timed),
        "phases": phases,
        "seconds_per_step_now": now,
        "seconds_per_step": typical,
        "tokens_per_s": tokens / typical,
        "seconds_per_checkpoint": save_s,
        "checkpoint_gb": saved / GB,
        "hours": hours(typical),
        "hours_low": hours(least),
        "hours_high": hours(now),
    }


def _group_size(settings: Recipe) -> int:
    return {"grpo": settings.grpo.group_size, "rft": settings.rft.group_size, "sft": 1}[settings.method]


def _share(work: Work, gpus: int) -> Work:
    """The largest share that a rank has of a step."""
    return Work(
        prompts=math.ceil(work.prompts / gpus),
        group=work.group,
        image_px=work.image_px,
        prompt_tokens=work.prompt_tokens,
        completion_tokens=work.completion_tokens,
    )


def _tokens_that_fit(size: Size, work: Work, layout: Layout, room: float) -> int:
    """Tokens, those of patches counted in, of a micro-batch that fills the room."""
    free = room - peak({**memory(size, work, layout), "activations": 0})
    return max(1, int(free / activations_per_token(size, layout)))


def _rates(measured: Path | None) -> tuple[Rates, float, str]:
    if measured is None:
        found: Mapping[str, Any] = {**ASSUMED, "fraction_of_limit": ASSUMED["share_of_limit"]}
        source = "assumed: an H100, a quarter of its limit; give --measured for a card you have"
    else:
        if not measured.is_file():
            raise RunError(
                f"there is no file {measured}: 'medrl bench step --json > {measured}' on such a card makes it"
            )
        try:
            found = json.loads(measured.read_text(encoding="utf-8"))
            source = f"{measured}: {found['device']}"
            _ = found["copy_gb_per_s"], found["matrix_tflops"], found["fraction_of_limit"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise RunError(
                f"{measured} is not what 'medrl bench step --json' prints ({error}): run it on such a card and keep "
                "its output"
            ) from None
        if str(found["device"]).startswith("CPU"):
            warnings.warn(
                f"{measured} was measured on a CPU ({found['device']}), and a plan for GPUs takes its rates: give what "
                "'medrl bench step --json' prints on such a GPU",
                stacklevel=2,
            )
    rates = Rates(bytes_per_s=1e9 * found["copy_gb_per_s"], flops_per_s=1e12 * found["matrix_tflops"])
    return rates, float(found["fraction_of_limit"]), source
