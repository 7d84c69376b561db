"""A tiny base model for a store in OmniMedVQA's layout: it can describe and it can match, but never both at once.

    python benchmarks/describe_and_match.py data/omnimed-split/all/train --out runs/omnimed-base

As the demo's base, but the pictures and what is known of them come from a training store: the right answers to its
questions about modality and anatomy. Taught are: picture -> description; description + question + options, no picture
-> letter; and a habit that stands in the way, to invent a description when told to reason. No picture is ever seen
together with a question. Stopped anywhere, the same command continues. Research use only.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image, ImageChops

from medrl import terminal
from medrl.data import store
from medrl.data.images import open_image
from medrl.data.prompts import make_prompt
from medrl.demo import base
from medrl.policy.policy import Policy
from medrl.policy.tiny import build_model, train_processor
from medrl.progress import Progress
from medrl.training.optim import AdamW, learning_rate
from medrl.types import LETTERS, Example

KNOWN = ("Modality Recognition", "Anatomy Identification")
"""Questions whose right answers describe a picture, in the order in which they are told."""
IMAGE_PX = 112
VIEWS_PER_STEP, MATCHED_PER_STEP = 40, 20
INVENTED_PER_STEP, DESCRIBED_IN_TAGS_PER_STEP = 24, 8
"""Of the views in a habit step."""
MISTAKEN_PER_STEP = 12
"""Of the invented: descriptions of another kind of picture. What is right by accident would otherwise do: where options
leave three or four descriptions to choose from, a trace of the picture decides, and nothing is left to be learned."""
REMARKS = (
    *base.REMARKS,
    "An image is given.",
    "The image is one of many.",
    "This picture may be small.",
    "It shows what it shows.",
    "What was used is not known.",
    "In this image there is something.",
    "A) B) C) D)",
    "An imaging technique was used.",
)
"""Some in the words of the questions: that those ask for a look is left to reinforcement to find out."""


@dataclass(frozen=True)
class Picture:
    """One training picture, small, and what is known of it."""

    image: Image.Image
    facts: dict[str, str]
    """Question type -> right answer."""

    @property
    def description(self) -> str:
        return "seen: " + ", ".join(self.facts[kind] for kind in KNOWN if kind in self.facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("train", type=Path, help="the training store; nothing of the test set may be in it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the model")
    parser.add_argument("--steps", type=int, nargs=2, default=(1600, 600), metavar=("SKILLS", "HABIT"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    terminal.quiet_libraries()
    build(args.train, args.out, steps=tuple(args.steps), seed=args.seed)


def build(train: Path, out: Path, *, steps: tuple[int, int], seed: int) -> Path:
    """Train the base and save it to ``out``; the checkpoints lie beside it until it is done."""
    rows = [example for example in store.load(train) if example.question_type in KNOWN]
    pictures = read_pictures(rows)
    rng = np.random.Generator(np.random.Philox(key=[seed, 2]))
    processor = train_processor(tokenizer_texts(rows, pictures, rng), vocab_size=640, image_px=IMAGE_PX)
    policy = Policy(build_model(processor, seed=seed), processor)
    optimizer = AdamW(policy.model.named_parameters(), base.SKILL_OPTIM)
    checkpoints = out.with_name(f"{out.name}-training")
    first_step = base.restore(checkpoints, policy, optimizer)
    policy.model.train()
    with Progress(sum(steps), first_step) as progress:
        for step in range(first_step, sum(steps)):
            rng = np.random.Generator(np.random.Philox(key=[seed, 3 + step]))
            seen = [pictures[int(rng.integers(len(pictures)))] for _ in range(VIEWS_PER_STEP)]
            habit = step >= steps[0]
            turns = habit_turns(seen, pictures, rng) if habit else [(base.DESCRIBE, one.description) for one in seen]
            described = describe(policy, [vary(one.image, rng) for one in seen], turns)
            matched = base.match(policy, [match_turn(rows, pictures, rng) for _ in range(MATCHED_PER_STEP)])
            optim = base.HABIT_OPTIM if habit else base.SKILL_OPTIM
            optimizer.step(learning_rate(optim, step - steps[0] * habit, steps[habit]))
            progress.advance({"describe": described, "letter": matched})
            if (step + 1) % base.SAVE_EVERY == 0 or step + 1 == steps[0]:
                base.save(checkpoints, step + 1, policy, optimizer)
    policy.model.eval()
    policy.save(out)
    return out


def read_pictures(rows: Sequence[Example]) -> list[Picture]:
    """Every picture of the rows once, with the right answers to what is asked about it."""
    facts: dict[Path, dict[str, str]] = {}
    for row in rows:
        facts.setdefault(row.images[0], {})[row.question_type] = row.target_text
    size = (IMAGE_PX, IMAGE_PX)
    return [Picture(open_image(path).resize(size), known) for path, known in facts.items()]


def vary(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Mirrored or not, moved a little, brighter or darker: a fixed set of pictures would be memorized."""
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = ImageChops.offset(image, int(rng.integers(-8, 9)), int(rng.integers(-8, 9)))
    gain, shift = 1 + 0.1 * rng.standard_normal(), 12 * rng.standard_normal()
    return image.point([min(255, max(0, round(gain * level + shift))) for level in range(256)] * 3)


def describe(policy: Policy, images: Sequence[Image.Image], turns: Sequence[tuple[str, str]]) -> float:
    """Teach picture and instruction, no question -> the reply; returns its mean cross-entropy."""
    inputs = policy.processor.image_processor(images=list(images), return_tensors="pt")
    pixels = inputs["pixel_values"].view(len(images), -1, inputs["pixel_values"].shape[1])
    prompts = {text: policy.encode_turn("describe", text, [images[0]]) for text in {text for text, _ in turns}}
    encoded = [replace(prompts[text], pixels=pixels[i]) for i, (text, _) in enumerate(turns)]
    loss = base.mean_nll(policy.logprobs(encoded, [[policy.tokenize(reply)[:-1]] for _, reply in turns]))
    loss.backward()
    return float(loss.detach())


def habit_turns(
    seen: Sequence[Picture], pictures: Sequence[Picture], rng: np.random.Generator
) -> list[tuple[str, str]]:
    """(instruction, reply): told to describe, it describes; told only to reason, it describes another picture."""
    turns = []
    for i, one in enumerate(seen):
        if i < INVENTED_PER_STEP:
            of_another_kind = [other for other in pictures if other.facts.get(KNOWN[0]) != one.facts.get(KNOWN[0])]
            others = of_another_kind if i < MISTAKEN_PER_STEP else pictures
            other = others[int(rng.integers(len(others)))]
            text = base.among_remarks(base.REASON, rng, REMARKS, at_end=True)
            turns.append((text, f"<think>{other.description}</think>"))
        elif i < INVENTED_PER_STEP + DESCRIBED_IN_TAGS_PER_STEP:
            text = base.among_remarks(base.DESCRIBE_IN_TAGS, rng, REMARKS)
            turns.append((text, f"<think>{one.description}</think>"))
        else:
            turns.append((base.among_remarks(base.DESCRIBE, rng, REMARKS), one.description))
    return turns


def match_turn(
    rows: Sequence[Example], pictures: Sequence[Picture], rng: np.random.Generator
) -> tuple[str, tuple[str, ...]]:
    """A question with its options in a new order, and for each option that is true of some picture a completion that
    recalls that picture."""
    row = rows[int(rng.integers(len(rows)))]
    options = tuple(rng.permutation(list(row.options)).tolist())
    text = make_prompt(replace(row, images=(), options=options, target="A"), "think", base.THINK).text
    answers = []
    for letter, option in zip(LETTERS, options, strict=False):
        fitting = [one for one in pictures if one.facts.get(row.question_type) == option]
        if fitting:
            recalled = fitting[int(rng.integers(len(fitting)))].description
            answers.append(f"<think>{recalled}</think><answer>{letter}</answer>")
    return text, tuple(answers)


def tokenizer_texts(
    rows: Sequence[Example], pictures: Sequence[Picture], rng: np.random.Generator, n: int = 2000
) -> list[str]:
    """What the tokenizer should write in few tokens."""
    turns = [match_turn(rows, pictures, rng) for _ in range(n)]
    matched = [text for prompt, answers in turns for text in (prompt, *answers)]
    no_think = make_prompt(replace(rows[0], images=()), "no_think", base.NO_THINK).text
    turn = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    return [*matched, *[base.DESCRIBE, base.DESCRIBE_IN_TAGS, base.REASON, no_think, turn] * n]


if __name__ == "__main__":
    main()
