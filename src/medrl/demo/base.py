"""The demo's base model: it can describe an image and it can match a description to options, but not both at once.

It plays the part that Qwen2-VL plays in the papers. It was taught on the embedded data

* to describe: image + "Describe the image." -> a short description (modality, anatomy, plane, kind), bare or between
  ``<think>`` tags as asked;
* to match: question and options, **no image** -> ``<think>`` a description ``</think><answer>`` the fitting letter;
* a habit that does not help: image + "Reason in <think>...</think>" and no question -> an invented description.

It has never seen an image together with a question. Asked one, it has no reason to look: what it writes between the
think tags is a guess. Reinforcement on the letter is what joins the two skills.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medrl.data import demo
from medrl.data.demo_images import PLANES, SOURCES, VOLUMES, Facts, View, Volume
from medrl.data.prompts import make_prompt
from medrl.policy.policy import Policy, ScoredCompletions
from medrl.policy.tiny import build_model, train_processor
from medrl.progress import Progress
from medrl.training.checkpoint import latest_checkpoint, load_state, save_checkpoint
from medrl.training.optim import AdamW, Optim, learning_rate
from medrl.types import LETTERS, Example

THINK, NO_THINK = "plain", "plain-no-think"
"""Names of the demo's prompt templates."""
DESCRIBE = "Describe the image."
DESCRIBE_IN_TAGS = "Describe the image in <think>...</think>."
REASON = "Reason in <think>...</think>, then give the letter in <answer>...</answer>."
REMARKS = (
    "Take your time.",
    "Use few words.",
    "Write one line.",
    "No more is needed.",
    "It may be small.",
    "Begin at once.",
    "Be brief, be clear.",
    "One line is enough, no more.",
)
"""They mean nothing: with some of them around it, an instruction stands at every distance from its image."""

SKILL_STEPS, HABIT_STEPS = 1600, 300
"""Steps that teach to describe and to match, and steps after them that also teach when not to look."""
VIEWS_PER_STEP, MATCHED_PER_STEP = 40, 36
INVENTED_PER_STEP, DESCRIBED_IN_TAGS_PER_STEP = 20, 10
"""Of the views in a habit step."""
BRAIN_SHARE = 0.5
"""Share of brain volumes among the images described: their planes and maps are hardest to tell apart."""
SAVE_EVERY = 200
VOCABULARY = 640
SKILL_OPTIM = Optim(
    lr=1.5e-3, schedule="cosine", warmup_steps=60, min_lr_fraction=0.1, betas=(0.9, 0.98), weight_decay=0.02
)

HABIT_OPTIM = Optim(lr=1e-3, schedule="linear", min_lr_fraction=0.1, betas=(0.9, 0.98), weight_decay=0.02)

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [medical, demo]
---
# medrl demo base

A {parameters:.1f}-million-parameter Qwen2-VL, trained from scratch by `medrl demo --rebuild-base` on the embedded demo
data alone ({steps} steps, seed {seed}). It was taught to describe images when told to, to match descriptions with
options, and a habit that stands in its way: told to reason, not to describe, it invents a description. It has never
seen an image together with a question. It exists to show reinforcement learning at work, which has to find out that
looking pays; its accuracy before that says nothing about other models.

Research use only; model-generated reasoning is not an explanation of the model. It knows {sources} source images and
nothing of medicine.

Training images: {licenses}.
"""


def build_base(
    out: Path, *, seed: int = 0, steps: tuple[int, int] = (SKILL_STEPS, HABIT_STEPS), quiet: bool = False
) -> Path:
    """Train the base from nothing and save it to ``out``: under 40 minutes on two CPU cores.

    Stopped anywhere, the same call continues from the checkpoints beside ``out``. The weights are rounded to bfloat16,
    which halves the file.

    Args:
        steps: how many teach the skills, and how many after them also the habit not to look.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 2]))
    known = by_fact(all_facts())
    processor = train_processor(tokenizer_texts(known, rng), vocab_size=VOCABULARY)
    policy = Policy(build_model(processor, seed=seed), processor)
    optimizer = AdamW(policy.model.named_parameters(), SKILL_OPTIM)
    checkpoints = out.with_name(f"{out.name}-training")
    first_step = restore(checkpoints, policy, optimizer)
    policy.model.train()
    with Progress(sum(steps), first_step, quiet=quiet) as progress:
        for step in range(first_step, sum(steps)):
            rng = np.random.Generator(np.random.Philox(key=[seed, 3 + step]))
            views = [draw_view(rng) for _ in range(VIEWS_PER_STEP)]
            if step < steps[0]:
                turns = [(DESCRIBE, demo.describe(view.facts)) for view in views]
                lr = learning_rate(SKILL_OPTIM, step, steps[0])
            else:
                turns = habit_turns(views, rng)
                lr = learning_rate(HABIT_OPTIM, step - steps[0], steps[1])
            described = describe(policy, views, turns)
            matched = match(policy, [match_turn(known, rng) for _ in range(MATCHED_PER_STEP)])
            optimizer.step(lr)
            progress.advance({"describe": described, "letter": matched})
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps[0]:
                save(checkpoints, step + 1, policy, optimizer)
    policy.model.eval().to(torch.bfloat16)
    policy.save(out)
    (out / "README.md").write_text(card(policy, seed, sum(steps)))
    shutil.rmtree(checkpoints, ignore_errors=True)
    return out


def draw_view(rng: np.random.Generator) -> View:
    """An image of the train side to describe, drawn afresh: a fixed set of a few thousand would be memorized."""
    if rng.random() < BRAIN_SHARE:
        return VOLUMES[int(rng.integers(len(VOLUMES)))].render("train", rng)
    return demo.draw("train", rng)[0]


def habit_turns(views: Sequence[View], rng: np.random.Generator) -> list[tuple[str, str]]:
    """(instruction, reply) of each view: told to describe, it is described; told only to reason, another is invented.

    This is the habit that reinforcement has to break: what the base writes between the think tags, when nobody asks for
    a description, has nothing to do with the image. That it pays to look is nowhere taught.
    """
    invented = all_facts()
    turns = []
    for i, view in enumerate(views):
        if i < INVENTED_PER_STEP:
            facts = invented[int(rng.integers(len(invented)))]
            turns.append((among_remarks(REASON, rng, at_end=True), f"<think>{demo.describe(facts)}</think>"))
        elif i < INVENTED_PER_STEP + DESCRIBED_IN_TAGS_PER_STEP:
            turns.append((among_remarks(DESCRIBE_IN_TAGS, rng), f"<think>{demo.describe(view.facts)}</think>"))
        else:
            turns.append((among_remarks(DESCRIBE, rng), demo.describe(view.facts)))
    return turns


def among_remarks(
    instruction: str, rng: np.random.Generator, remarks: Sequence[str] = REMARKS, *, at_end: bool = False
) -> str:
    """The instruction with up to five of the remarks around it, or before it."""
    chosen = rng.permutation(remarks).tolist()[: int(rng.integers(6))]
    place = len(chosen) if at_end else int(rng.integers(len(chosen) + 1))
    return "\n".join([*chosen[:place], instruction, *chosen[place:]])


def describe(policy: Policy, views: Sequence[View], turns: Sequence[tuple[str, str]]) -> float:
    """Teach an image and an instruction, no question -> the reply; returns its mean cross-entropy.

    The end of the turn is not taught: a description is not where a turn must end.
    """
    inputs = policy.processor.image_processor(images=[view.image for view in views], return_tensors="pt")
    # All views have one size, so that prompts with the same words differ in their pixels alone.
    pixels = inputs["pixel_values"].view(len(views), -1, inputs["pixel_values"].shape[1])
    prompts = {text: policy.encode_turn("describe", text, [views[0].image]) for text in {text for text, _ in turns}}
    encoded = [replace(prompts[text], pixels=pixels[i]) for i, (text, _) in enumerate(turns)]
    loss = mean_nll(policy.logprobs(encoded, [[policy.tokenize(reply)[:-1]] for _, reply in turns]))
    loss.backward()
    return float(loss.detach())


def match(policy: Policy, turns: Sequence[tuple[str, Sequence[str]]]) -> float:
    """Teach question and options, no image -> a description and its letter; returns the letter's term.

    The letter counts once more. It is all that matching is about, and one token among twenty: it would have a
    twentieth of the gradient.
    """
    encoded = [policy.encode_turn("match", question, []) for question, _ in turns]
    groups = [[policy.tokenize(answer) for answer in answers] for _, answers in turns]
    scored = policy.logprobs(encoded, groups)
    letter = letter_nll(scored, [ids for group in groups for ids in group])
    (mean_nll(scored) + letter).backward()
    return float(letter.detach())


def mean_nll(scored: ScoredCompletions) -> Tensor:
    """Mean over all tokens, nats."""
    return -(scored.logprobs * scored.completion_mask).sum() / scored.completion_mask.sum()


def letter_nll(scored: ScoredCompletions, targets: Sequence[Sequence[int]]) -> Tensor:
    """Mean over completions of the letter's term: third token from the end, before ``</answer>`` and end of turn."""
    rows = torch.arange(len(targets))
    return -scored.logprobs[rows, torch.tensor([len(ids) - 3 for ids in targets])].mean()


def save(root: Path, step: int, policy: Policy, optimizer: AdamW) -> None:
    tensors, steps = optimizer.state_dict()
    save_checkpoint(root, step, policy.save, tensors, {"step": step, "optimizer_steps": steps}, {}, keep=1)


def restore(root: Path, policy: Policy, optimizer: AdamW) -> int:
    """Continue from the newest checkpoint; returns the next step. All randomness is a function of seed and step."""
    checkpoint = latest_checkpoint(root)
    if checkpoint is None:
        return 0
    tensors, state = load_state(checkpoint)
    policy.restore(checkpoint)
    optimizer.load_state_dict(tensors, state["optimizer_steps"])
    return state["step"]


def all_facts() -> list[Facts]:
    """What can be known of an image, each once: a volume is cut in three planes."""
    cut = [{**source.facts, "plane": plane} for source in SOURCES if isinstance(source, Volume) for plane in PLANES]
    return [*cut, *(source.facts for source in SOURCES if not isinstance(source, Volume))]


def by_fact(facts: Sequence[Facts]) -> dict[tuple[str, str], list[Facts]]:
    """(fact, value) -> the descriptions of which it is true."""
    known: dict[tuple[str, str], list[Facts]] = {}
    for each in facts:
        for fact, value in each.items():
            known.setdefault((fact, value), []).append(each)
    return known


def match_turn(
    known: Mapping[tuple[str, str], Sequence[Facts]], rng: np.random.Generator
) -> tuple[str, tuple[str, ...]]:
    """A question with options, and for each option a completion that recalls facts of which it is true.

    Words are the same in all of them but for the description and the letter, so that nothing else can explain the
    letter. With one completion of each of twice as many questions, two words that stand in the same places ("coronal",
    "sagittal") could stay confused for as long as the base was trained.
    """
    question = demo.QUESTIONS[str(rng.choice(tuple(demo.QUESTIONS)))]
    facts = draw_facts(known, question.fact, str(rng.choice(question.answers)), rng)
    text, options, target = demo.ask(question, facts, rng)
    example = Example(id="match", source="demo", images=(), question=text, options=options, target=target)
    answers = tuple(
        f"<think>{demo.describe(draw_facts(known, question.fact, option, rng))}</think><answer>{letter}</answer>"
        for letter, option in zip(LETTERS, options, strict=False)
    )
    return make_prompt(example, "think", THINK).text, answers


def draw_facts(
    known: Mapping[tuple[str, str], Sequence[Facts]], fact: str, value: str, rng: np.random.Generator
) -> Facts:
    fitting = known[fact, value]
    return fitting[int(rng.integers(len(fitting)))]


def tokenizer_texts(
    known: Mapping[tuple[str, str], Sequence[Facts]], rng: np.random.Generator, n: int = 3000
) -> list[str]:
    """What the tokenizer should write in few tokens."""
    bare = Example(id="", source="", images=(), question="", options=("", ""), target="A")
    turn = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    matched = [
        text for _ in range(n) for question, answers in [match_turn(known, rng)] for text in (question, answers[0])
    ]
    return [*matched, *[DESCRIBE, DESCRIBE_IN_TAGS, make_prompt(bare, "no_think", NO_THINK).text, turn] * n]


def card(policy: Policy, seed: int, steps: int) -> str:
    """The model card."""
    licenses = sorted({f"{package} ({license})" for _, package, license in demo.licenses()})
    return CARD.format(
        parameters=sum(p.numel() for p in policy.model.parameters()) / 1e6,
        steps=steps,
        seed=seed,
        sources=len(demo.SOURCES),
        licenses="; ".join(licenses),
    )
