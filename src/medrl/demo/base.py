"""The demo's base model: it can describe an image and it can match a description to options, but not both at once.

It plays the part that Qwen2-VL plays in the papers. It was taught two skills on the embedded data, apart:

* describe: image + "Describe the image." -> a short description (modality, anatomy, plane, kind), bare or between
  ``<think>`` tags as asked;
* match: question and options, **no image** -> ``<think>`` a description ``</think><answer>`` the letter that fits it.

It has never seen an image together with a question. Asked one, it has no reason to look: what it writes between the
think tags is a guess. Reinforcement on the letter is what joins the two skills.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medrl.data import demo
from medrl.data.demo_images import VOLUMES, Facts, View
from medrl.data.prompts import make_prompt
from medrl.policy.policy import EncodedPrompt, Policy
from medrl.policy.tiny import build_model, train_processor
from medrl.progress import Progress
from medrl.training.optim import AdamW, Optim, learning_rate
from medrl.types import Example

THINK, NO_THINK = "plain", "plain-no-think"
"""Names of the demo's prompt templates."""
DESCRIBE = "Describe the image."
DESCRIBE_IN_TAGS = "Describe the image in <think>...</think>."

MATCHED = {
    "modality": 0.2,
    "anatomy": 0.25,
    "plane": 0.2,
    "tissue": 0.2,
    "ultrasound": 0.05,
    "fundus": 0.05,
    "microscopy": 0.05,
}
"""How often each question is matched."""

STEPS = 1200
DESCRIBED_PER_STEP, MATCHED_PER_STEP = 20, 60
VIEWS, BRAIN_SHARE = 3000, 0.5
"""Images to describe, and the share of brain volumes among them: their planes and maps are hardest to tell apart."""
VOCABULARY = 640
OPTIM = Optim(lr=1.5e-3, schedule="cosine", warmup_steps=60, min_lr_fraction=0.02, betas=(0.9, 0.98), weight_decay=0.02)

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: image-text-to-text
tags: [medical, demo]
---
# medrl demo base

A {parameters:.1f}-million-parameter Qwen2-VL, trained from scratch by `medrl demo --rebuild-base` on the embedded demo
data alone ({steps} steps, seed {seed}). It was taught to describe images and, apart from that, to match descriptions
with options; it has never seen an image together with a question. It exists to show reinforcement learning at work.

Research use only; model-generated reasoning is not an explanation of the model. It knows {sources} source images and
nothing of medicine.

Training images: {licenses}.
"""


def build_base(out: Path, *, seed: int = 0, steps: int = STEPS, quiet: bool = False) -> Path:
    """Train the base from nothing and save it to ``out``: under 40 minutes on two CPU cores.

    The weights are rounded to bfloat16, which halves the file.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, 2]))
    views = draw_views(rng)
    known = by_fact(views)
    processor = train_processor(tokenizer_texts(known, rng), vocab_size=VOCABULARY)
    policy = Policy(build_model(processor, seed=seed), processor)
    descriptions = describe_turns(policy, views)
    optimizer = AdamW(policy.model.named_parameters(), OPTIM)
    policy.model.train()
    with Progress(steps, 0, quiet=quiet) as progress:
        for step in range(steps):
            seen = [descriptions[i] for i in rng.integers(len(descriptions), size=DESCRIBED_PER_STEP)]
            described = imitate(policy, [prompt for prompt, _ in seen], [text for _, text in seen], open_end=True)
            turns = [match_turn(known, rng) for _ in range(MATCHED_PER_STEP)]
            encoded = [policy.encode_turn("match", question, []) for question, _ in turns]
            matched = imitate(policy, encoded, [answer for _, answer in turns], letters=True)
            optimizer.step(learning_rate(OPTIM, step, steps))
            progress.advance({"describe": described.tokens, "letter": matched.letter})
    policy.model.eval().to(torch.bfloat16)
    policy.save(out)
    (out / "README.md").write_text(card(policy, seed, steps))
    return out


def draw_views(rng: np.random.Generator) -> list[View]:
    """Images of the train side to describe."""
    n_brain = int(BRAIN_SHARE * VIEWS)
    brain = [VOLUMES[int(rng.integers(len(VOLUMES)))].render("train", rng) for _ in range(n_brain)]
    return brain + [demo.draw("train", rng)[0] for _ in range(VIEWS - n_brain)]


def describe_turns(policy: Policy, views: Sequence[View]) -> list[tuple[EncodedPrompt, str]]:
    """An image, no question, and its description: of each view once bare, and once between the think tags.

    The tags teach where a description belongs. That one should be written before a question is answered, from the
    image and not from the question, is left for reinforcement to find.
    """
    bare = [policy.encode_turn("describe", DESCRIBE, [view.image]) for view in views]
    tagged = policy.encode_turn("describe", DESCRIBE_IN_TAGS, [views[0].image])
    texts = [demo.describe(view.facts) for view in views]
    # All views have one size, so the tagged prompts differ in their pixels alone.
    in_tags = [
        (replace(tagged, pixels=prompt.pixels), f"<think>{text}</think>")
        for prompt, text in zip(bare, texts, strict=True)
    ]
    return [*zip(bare, texts, strict=True), *in_tags]


def by_fact(views: Sequence[View]) -> dict[tuple[str, str], list[Facts]]:
    """(fact, value) -> what is known of the views of which it is true."""
    known: dict[tuple[str, str], list[Facts]] = {}
    for view in views:
        for fact, value in view.facts.items():
            known.setdefault((fact, value), []).append(view.facts)
    return known


def match_turn(known: Mapping[tuple[str, str], Sequence[Facts]], rng: np.random.Generator) -> tuple[str, str]:
    """A question about what is known of some view, and a completion that recalls the facts and picks the letter.

    The answer is drawn evenly, not the view: were most answers "MRI", its letter could be found without the facts.
    """
    while True:
        question = demo.QUESTIONS[str(rng.choice(tuple(MATCHED), p=tuple(MATCHED.values())))]
        fitting = known.get((question.fact, str(rng.choice(question.answers))))
        if fitting:
            break
    facts = fitting[int(rng.integers(len(fitting)))]
    text, options, target = demo.ask(question, facts, rng)
    example = Example(id="match", source="demo", images=(), question=text, options=options, target=target)
    answer = f"<think>{demo.describe(facts)}</think><answer>{target}</answer>"
    return make_prompt(example, "think", THINK).text, answer


def tokenizer_texts(
    known: Mapping[tuple[str, str], Sequence[Facts]], rng: np.random.Generator, n: int = 3000
) -> list[str]:
    """What the tokenizer should write in few tokens."""
    bare = Example(id="", source="", images=(), question="", options=("", ""), target="A")
    turn = "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    turns = [text for _ in range(n) for text in match_turn(known, rng)]
    return [*turns, *[DESCRIBE, DESCRIBE_IN_TAGS, make_prompt(bare, "no_think", NO_THINK).text, turn] * n]


@dataclass(frozen=True, slots=True)
class Imitation:
    """Cross-entropies of one batch, nats."""

    tokens: float
    """Mean over all tokens."""
    letter: float
    """Mean over the answers' letters."""


def imitate(
    policy: Policy,
    encoded: Sequence[EncodedPrompt],
    texts: Sequence[str],
    *,
    letters: bool = False,
    open_end: bool = False,
) -> Imitation:
    """Add the gradient of the cross-entropy of ``texts``; with ``letters`` the answer's letter counts once more.

    One letter among twenty tokens is all that matching is about, and it would have a twentieth of the gradient. With
    ``open_end`` what comes after the text is not taught: a description is not where a turn must end.
    """
    targets = [policy.tokenize(text)[: -1 if open_end else None] for text in texts]
    scored = policy.logprobs(encoded, [[ids] for ids in targets])
    nll = -(scored.logprobs * scored.completion_mask)
    loss = nll.sum() / scored.completion_mask.sum()
    letter = letter_nll(nll, targets)
    (loss + letter if letters else loss).backward()
    return Imitation(float(loss.detach()), float(letter.detach()))


def letter_nll(nll: Tensor, targets: Sequence[Sequence[int]]) -> Tensor:
    """Mean over completions of the letter's term: third token from the end, before ``</answer>`` and end of turn."""
    rows = torch.arange(len(targets))
    return nll[rows, torch.tensor([len(ids) - 3 for ids in targets])].mean()


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
