"""What a step costs elsewhere, on the same shapes: the obvious way in this package, and TRL's trainer."""

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from medrl.bench.limits import Elapsed, clock, median, release, say_turn
from medrl.bench.models import Endless, ask, build_model, build_policy, find_size, make_processor
from medrl.errors import MedrlError, MissingExtraError
from medrl.grpo import GRPO, REDUCTIONS, group_advantages, policy_loss
from medrl.policy.naive import naive_logprobs
from medrl.policy.policy import EncodedPrompt
from medrl.training.optim import AdamW, Optim
from medrl.types import Example

if TYPE_CHECKING:
    from medrl.bench.step import StepBench

TRL_STEPS = 3
"""One to warm up, the others timed: a step of TRL is long."""


def naive_step(settings: "StepBench", examples: Sequence[Example], device: str, dtype: torch.dtype) -> Elapsed:
    """A step without anything shared, median.

    transformers' ``generate`` over every prompt repeated for every completion, then one forward (and backward) pass per
    completion behind its own image, for reference and policy.
    """
    work = settings.work
    policy = build_policy(find_size(settings.model), work.image_px, device, dtype)
    if settings.kl_coef > 0:
        policy.freeze_reference()
    optimizer = AdamW(policy.model.named_parameters(), Optim(lr=1e-6))
    times = []
    steps = min(settings.steps, len(examples) // work.prompts - 1)
    for number in range(1 + steps):
        batch = examples[number * work.prompts : (number + 1) * work.prompts]
        with clock(device) as elapsed:
            _take_naive_step(policy, batch, optimizer, settings)
        say_turn("naive", "step", number - 1, elapsed, of=steps)
        times.append(elapsed)
    return median(times[1:])


def _take_naive_step(policy: Endless, examples: Sequence[Example], optimizer: AdamW, settings: "StepBench") -> None:
    work = settings.work
    encoded = policy.encode([ask(example) for example in examples])
    written = generate_with_transformers(policy, encoded, work.group, work.completion_tokens, sample=True)
    rows = written.tolist()
    completions = [rows[n * work.group : (n + 1) * work.group] for n in range(len(encoded))]
    advantages = group_advantages([[float(sum(row) % 97) for row in group] for group in completions])
    weight = REDUCTIONS["sequence"](torch.full((work.rows,), work.completion_tokens))[0].to(policy.device)
    objective = GRPO(group_size=work.group, kl_coef=settings.kl_coef)
    for prompt, group, values in zip(encoded, completions, advantages.tolist(), strict=True):
        for completion, advantage in zip(group, values, strict=True):
            reference = None
            if settings.kl_coef > 0:
                with torch.no_grad():
                    reference = naive_logprobs(policy.reference, [prompt], [[completion]])[0][None]
            logprobs = naive_logprobs(policy, [prompt], [[completion]])[0][None]
            terms = policy_loss(
                logprobs,
                torch.tensor([[advantage]], device=policy.device),
                torch.ones_like(logprobs),
                weight[None],
                objective,
                ref_logprobs=reference,
            )
            with optimizer.summing():
                terms.loss.backward()
    optimizer.step(1e-6)


@torch.no_grad()
def generate_with_transformers(
    policy: Endless, encoded: Sequence[EncodedPrompt], group: int, tokens: int, *, sample: bool
) -> Tensor:
    """(N * group, tokens) of transformers' own ``generate``; all prompts are of one length."""
    ids = torch.stack([prompt.token_ids for prompt in encoded]).repeat_interleave(group, 0).to(policy.device)
    repeated = [prompt for prompt in encoded for _ in range(group)]
    pixels = torch.cat([prompt.pixels for prompt in repeated if prompt.pixels is not None])
    how: dict[str, Any] = {"do_sample": False}
    if sample:
        how = {"do_sample": True, "top_k": 0, "temperature": 1.0, "suppress_tokens": placeholders(policy.processor)}
    with policy.using_attention("sdpa"):
        out = policy.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=pixels.to(policy.device, policy.family.head.dtype),
            image_grid_thw=torch.cat([prompt.grids for prompt in repeated]).to(policy.device),
            mm_token_type_ids=(ids == policy.family.image_token_id).int(),
            min_new_tokens=tokens,
            max_new_tokens=tokens,
            **how,
        )
    return out[:, ids.shape[1] :]


def trl_step(settings: "StepBench", examples: Sequence[Example], device: str, dtype: torch.dtype) -> Elapsed:
    """A step of TRL's GRPOTrainer with transformers' generation, the same model and shapes, median.

    Without activation checkpointing and, on a CPU, in one batch: the faster of its settings there. On a GPU in batches
    of 8: its logits of all tokens are held at once, and what fits has not been measured here.
    """
    config_class, trainer_class = _import_trl()
    from datasets import Dataset
    from transformers import PrinterCallback

    work = settings.work
    batch = work.rows if device == "cpu" else min(8, work.rows)
    times: list[Elapsed] = []
    with tempfile.TemporaryDirectory(prefix="medrl-trl-") as folder:
        processor = make_processor(find_size(settings.model).vocabulary, work.image_px)
        model: Any = build_model(find_size(settings.model), processor, device, dtype)
        model.save_pretrained(Path(folder) / "model")
        processor.save_pretrained(Path(folder) / "model")
        del model
        release(device)
        rows = [
            {
                "prompt": [{"role": "user", "content": example.question}],
                "image": Image.open(example.images[0]).convert("RGB"),
            }
            for example in examples[: TRL_STEPS * work.prompts]
        ]
        config = config_class(
            output_dir=str(Path(folder) / "out"),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=work.rows // batch,
            num_generations=work.group,
            max_completion_length=work.completion_tokens,
            beta=settings.kl_coef,
            bf16=device == "cuda",
            use_cpu=device == "cpu",
            gradient_checkpointing=False,
            max_steps=TRL_STEPS,
            logging_steps=1000,
            report_to=[],
            save_strategy="no",
            learning_rate=1e-6,
            temperature=1.0,
            optim="adamw_torch",
            disable_tqdm=True,
            model_init_kwargs={"dtype": str(dtype).removeprefix("torch."), "attn_implementation": "sdpa"},
            generation_kwargs={"min_new_tokens": work.completion_tokens, "suppress_tokens": placeholders(processor)},
        )
        trainer = trainer_class(
            model=str(Path(folder) / "model"),
            reward_funcs=_lengthless_reward,
            args=config,
            train_dataset=Dataset.from_list(rows),
            processing_class=processor,
            callbacks=[_timer(times, device)],
        )
        trainer.remove_callback(PrinterCallback)  # what is printed here is for programs
        trainer.train()
    return median(times[1:])


def _lengthless_reward(completions: Sequence[Any], **_: object) -> list[float]:
    return [float(sum(map(ord, str(completion))) % 97) for completion in completions]


def _timer(times: list[Elapsed], device: str) -> Any:
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        """Times each step of the trainer."""

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.clock = clock(device)
            times.append(self.clock.__enter__())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.clock.__exit__(None, None, None)
            say_turn("trl", "step", len(times) - 2, times[-1], of=TRL_STEPS - 1)

    return Timer()


def placeholders(processor: Any) -> list[int]:
    """Tokens that stand for images: written by a model of random weights, transformers would look for the image."""
    return processor.tokenizer.convert_tokens_to_ids(["<|image_pad|>", "<|video_pad|>"])


def _import_trl() -> tuple[Any, Any]:
    """Its settings and its trainer."""
    if importlib.util.find_spec("trl") is None:
        raise MissingExtraError("trl", "interop")
    try:
        from trl.trainer.grpo_config import GRPOConfig
        from trl.trainer.grpo_trainer import GRPOTrainer
    except (ImportError, RuntimeError) as error:  # RuntimeError: a module of transformers that it needs is broken
        raise MedrlError(
            f"trl is installed but cannot be imported: {error}; pip install --upgrade 'medrl[interop]'"
        ) from error
    return GRPOConfig, GRPOTrainer


BASELINES: dict[str, Callable[..., Elapsed]] = {"naive": naive_step, "trl": trl_step}
"""(settings, examples, device, dtype) -> what a step takes."""
