"""The embedded data set: real medical images that installed packages ship, and questions that their origin answers.

Nothing is downloaded and nothing is copied into this repository. ``demo_images`` draws one crop or slice of a source,
with what is known of it; here it is asked about, and ``build_demo`` turns a fixed draw into a train and a test store.

Nobody can answer blind: right answers are balanced and distractors are drawn evenly from the other right answers.
"""

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from medrl.data.demo_images import GRAY, PLANES, SOURCES, T1, VOLUMES, WHITE, Facts, Split, View
from medrl.data.store import StoreInfo, read_info, write_store
from medrl.types import LETTERS, Example

TRAIN_IMAGES, TEST_IMAGES = 1600, 600


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing that can be asked, and the answers it draws its options from."""

    fact: str
    question_type: str
    wordings: tuple[str, ...]
    answers: tuple[str, ...]


QUESTIONS: dict[str, Question] = {
    "modality": Question(
        fact="modality",
        question_type="Modality Recognition",
        wordings=("Which modality was used?", "How was this image made?"),
        answers=("CT", "MRI", "ultrasound", "fundus photography", "microscopy"),
    ),
    "anatomy": Question(
        fact="anatomy",
        question_type="Anatomy Identification",
        wordings=("What does the image show?", "Which part of the body is shown?"),
        answers=("brain", "spine", "abdomen", "lymph node", "heart", "retina", "colon", "single cell"),
    ),
    "plane": Question(
        fact="plane",
        question_type="Imaging Plane",
        wordings=("Which plane is shown?", "In which plane was the slice cut?"),
        answers=PLANES,
    ),
    "kind": Question(
        fact="kind",
        question_type="Other Biological Attributes",
        wordings=("What kind of image is this?", "Which description fits the image?"),
        answers=(
            T1,
            GRAY,
            WHITE,
            "color Doppler",
            "B-mode",
            "color photograph",
            "green-channel image",
            "immunostained section",
            "phase image",
        ),
    ),
}

ASKED: dict[str, float] = {"modality": 0.2, "anatomy": 0.25, "plane": 0.3, "kind": 0.25}
"""How often each question is asked; an image is asked one."""


def ask(question: Question, facts: Facts, rng: np.random.Generator) -> tuple[str, tuple[str, ...], str]:
    """-> question text, 2 to 4 options in random order, letter of the right one."""
    answer = facts[question.fact]
    others = [option for option in question.answers if option != answer]
    n_others = min(len(others), int(rng.choice((1, 2, 3), p=(0.2, 0.4, 0.4))))
    options = [answer, *rng.permutation(others).tolist()[:n_others]]
    options = rng.permutation(options).tolist()
    return str(rng.choice(question.wordings)), tuple(options), LETTERS[options.index(answer)]


def draw(split: Split, rng: np.random.Generator) -> tuple[View, str]:
    """One image and the name of the question it is asked, with the answer (not the source) drawn evenly."""
    name = str(rng.choice(tuple(ASKED), p=tuple(ASKED.values())))
    answer = str(rng.choice(QUESTIONS[name].answers))
    if name == "plane":
        return VOLUMES[int(rng.integers(len(VOLUMES)))].render(split, rng, plane=answer), name
    able = [source for source in SOURCES if source.facts.get(QUESTIONS[name].fact) == answer]
    if name != "kind":  # a tissue map is computed from MRI, not taken by it: it is not asked for its modality
        able = [source for source in able if source.facts.get("kind") not in (GRAY, WHITE)]
    return able[int(rng.integers(len(able)))].render(split, rng), name


DESCRIBED = ("modality", "anatomy", "plane", "kind")


def describe(facts: Facts) -> str:
    """What is known of an image, in one line: ``seen: MRI, brain, axial, gray-matter map``."""
    # The lead-in puts a blank before every fact, so that a fact has the same tokens here as among options.
    return "seen: " + ", ".join(facts[fact] for fact in DESCRIBED if fact in facts)


def build_examples(split: Split, n_images: int, seed: int, folder: Path) -> list[Example]:
    """Draw ``n_images`` and what they are asked; image files go to ``folder``. The same seed gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.Generator(np.random.Philox(key=[seed, 0 if split == "train" else 1]))
    examples = []
    for number in range(n_images):
        view, name = draw(split, rng)
        path = folder / f"{split}-{number:04d}.png"
        view.image.save(path)
        text, options, target = ask(QUESTIONS[name], view.facts, rng)
        examples.append(
            Example(
                id=f"{split}-{number:04d}-{name}",
                source=view.source,
                images=(path,),
                question=text,
                options=options,
                target=target,
                modality=view.facts["modality"],
                question_type=QUESTIONS[name].question_type,
            )
        )
    return examples


def licenses() -> list[tuple[str, str, str]]:
    """(source, package that ships it, licence) of every source."""
    return [(source.name, source.package, source.license) for source in SOURCES]


def build_demo(
    out: Path, *, seed: int = 0, train_images: int = TRAIN_IMAGES, test_images: int = TEST_IMAGES
) -> dict[Split, StoreInfo]:
    """Write the stores ``out/train`` and ``out/test``; one that is there already stays."""
    infos: dict[Split, StoreInfo] = {}
    sizes: dict[Split, int] = {"train": train_images, "test": test_images}
    for split, n_images in sizes.items():
        if (out / split / "store.json").exists():  # an earlier call was stopped after this one
            infos[split] = read_info(out / split)
            continue
        with TemporaryDirectory() as folder:
            examples = build_examples(split, n_images, seed, Path(folder))
            infos[split] = write_store(
                out / split,
                examples,
                source="medrl embedded demo",
                license="mixed, see sources",
                extra={"sources": [list(row) for row in licenses()], "split": split, "seed": seed},
            )
    return infos
