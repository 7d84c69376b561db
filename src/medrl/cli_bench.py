"""The commands that time this machine: bench step, bench eval."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal

import typer

from medrl import terminal

benches = typer.Typer(
    help="""Time a step or an evaluation on this machine.

\b
Example:
  medrl bench step --model 25m --baseline naive
""",
    no_args_is_help=True,
    rich_markup_mode=None,
)

ModelSize = Annotated[str, typer.Option("--model", help="tiny, 25m, 2b or 7b; also qwen2-vl-2b, qwen2-vl-7b.")]
Init = Annotated[Literal["random"], typer.Option(help="Where weights come from: the architecture is built from code.")]


@benches.command("step")
def bench_step(
    model: ModelSize = "25m",
    init: Init = "random",
    prompts: Annotated[int, typer.Option(min=1, help="Prompts per step.")] = 4,
    group: Annotated[int, typer.Option(min=2, help="Completions per prompt.")] = 8,
    image_px: Annotated[int, typer.Option(min=28, help="Side of the one image of each prompt.")] = 224,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a prompt.")] = 80,
    completion_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every completion.")] = 64,
    kl: Annotated[float, typer.Option(min=0, help="KL weight; at 0 no reference is loaded.")] = 0.04,
    steps: Annotated[int, typer.Option(min=1, help="Timed steps, after the warm-up.")] = 5,
    baseline: Annotated[
        Literal["naive", "trl"] | None, typer.Option(help="Time this too, on the same shapes; trl: its GRPOTrainer.")
    ] = None,
    attention: Annotated[
        Literal["auto", "dense", "flex", "varlen"], typer.Option(help="Back end of packed attention.")
    ] = "auto",
    tokens_per_micro_batch: Annotated[
        int | None, typer.Option(min=1, help="Default: found on a GPU, 4096 on a CPU.")
    ] = None,
    checkpoint_activations: Annotated[
        bool, typer.Option("--checkpoint-activations", help="Recompute layers in the backward pass.")
    ] = False,
    compile_layers: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="Compile the layers; auto: on a GPU.")
    ] = "auto",
    kernels: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="Use fused kernels; auto: on a GPU where they work.")
    ] = "auto",
    as_json: terminal.Json = False,
) -> None:
    """Time a GRPO step.

    And its phases, against the limits of the machine.

    \b
    Example:
      medrl bench step --model 25m --prompts 4 --group 8 --image-px 224 --completion-tokens 64 --baseline naive
      medrl bench step --model qwen2-vl-2b --prompts 8 --image-px 448 --completion-tokens 160 --json
    """
    from medrl.bench import step
    from medrl.bench.limits import Work

    terminal.quiet_libraries()
    result = step.bench_step(
        step.StepBench(
            model=model,
            work=Work(
                prompts=prompts,
                group=group,
                image_px=image_px,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
            ),
            kl_coef=kl,
            steps=steps,
            baseline=baseline,
            attention=attention,
            tokens_per_micro_batch=tokens_per_micro_batch,
            checkpoint_activations=checkpoint_activations,
            compile_layers="auto" if compile_layers == "auto" else compile_layers == "on",
            kernels="auto" if kernels == "auto" else kernels == "on",
        ),
        measured=_when_measured(_show_step, as_json=as_json, baseline=baseline is not None),
    )
    if as_json:
        terminal.print_json(result)
    elif baseline is not None:
        typer.echo(
            f"{baseline}: {result['baseline']['seconds_per_step']:.3f} s per step, {result['speedup']:.1f} times ours"
        )


@benches.command("eval")
def bench_eval(
    model: ModelSize = "25m",
    init: Init = "random",
    items: Annotated[int, typer.Option(min=1, help="Questions, each with an image of its own.")] = 64,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts decoded together.")] = 64,
    image_px: Annotated[int, typer.Option(min=28, help="Side of the images.")] = 224,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Text tokens of a prompt.")] = 80,
    completion_tokens: Annotated[int, typer.Option(min=1, help="Tokens of every answer.")] = 96,
    repeats: Annotated[int, typer.Option(min=1, help="Timed rounds, after the warm-up.")] = 3,
    baseline: Annotated[bool, typer.Option(help="Also time transformers' generate in batches of 64.")] = True,
    compile_layers: Annotated[
        Literal["auto", "on", "off"], typer.Option(help="Compile the layers; auto: on a GPU.")
    ] = "auto",
    as_json: terminal.Json = False,
) -> None:
    """Time greedy evaluation.

    \b
    Example:
      medrl bench eval --model 25m --items 64 --image-px 224
      medrl bench eval --model qwen2-vl-2b --items 256 --image-px 392 --json
    """
    from medrl.bench import evaluation

    terminal.quiet_libraries()
    result = evaluation.bench_eval(
        evaluation.EvalBench(
            model=model,
            items=items,
            batch_size=batch_size,
            image_px=image_px,
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            repeats=repeats,
            baseline=baseline,
            compile_layers="auto" if compile_layers == "auto" else compile_layers == "on",
        ),
        measured=_when_measured(_show_eval, as_json=as_json, baseline=baseline),
    )
    if as_json:
        terminal.print_json(result)
    elif baseline:
        other = result["baseline"]
        typer.echo(
            f"{other['name']}: {other['items_per_s']:.1f} items/s; medrl is {result['speedup']:.1f} times as fast, "
            f"and {result['same_tokens']:.0%} of the answers are the same"
        )


def _when_measured(
    show: Callable[[dict[str, Any]], None], *, as_json: bool, baseline: bool
) -> Callable[[dict[str, Any]], None]:
    """What becomes of what is known before a baseline begins: shown, or for a program among the messages.

    A baseline may run out of memory, or of somebody's patience.
    """

    def say(found: dict[str, Any]) -> None:
        if not as_json:
            show(found)
        elif baseline:
            typer.echo(f"measured: {json.dumps(found, default=str)}", err=True)

    return say


def _show_step(found: dict[str, Any]) -> None:
    limits = found["limit_phases"]
    rows = [
        (name, _milliseconds(spent), _milliseconds(limits[name]) if name in limits else "")
        for name, spent in found["phases"].items()
    ]
    total = ("step", _milliseconds(found["seconds_per_step"]), _milliseconds(found["limit_seconds"]))
    terminal.print_table(f"{found['model']}, {found['device']}", ["phase", "ms", "limit, ms"], [*rows, total])
    typer.echo(
        f"{found['tokens_per_s']:.0f} tokens/s, {found['fraction_of_limit']:.0%} of the limit, "
        f"MFU {found['mfu']:.0%}, peak {found['peak_gb']:.1f} GB, attention {found['attention']}"
        + (", layers compiled" if found["compiled"] else "")
        + (f", fused: {' and '.join(found['kernels'])}" if found["kernels"] else "")
    )


def _milliseconds(seconds: float) -> str:
    """``1310``, ``45.6``, ``0.0213``: three figures, as a limit may be a thousandth of its step."""
    return f"{1000 * seconds:.0f}" if seconds >= 0.1 else f"{1000 * seconds:#.3g}"


def _show_eval(found: dict[str, Any]) -> None:
    typer.echo(
        f"{found['model']}, {found['device']}: {found['items_per_s']:.1f} items/s, {found['decode_steps']} decode steps"
        + (", layers compiled" if found["compiled"] else "")
        + (f", fused: {' and '.join(found['kernels'])}" if found["kernels"] else "")
    )
