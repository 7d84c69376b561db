"""The records that travel between the rooms. Everything imports this module; it imports nothing of ours.

    Example -> Prompt -> Completion -> Score -> Rollout -> Group -> Groups -> (training)
                                                                  EvalRecord -> (evaluation, report)

All are frozen: a stage makes new records, it never edits what it was given.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Mode = Literal["think", "no_think", "think_after"]
"""The form of completion asked for: reasoning then answer, answer only, answer then reasoning."""

MODES: tuple[Mode, ...] = ("think", "no_think", "think_after")
LETTERS = "ABCDEFGHIJ"

Kind = Literal["choice", "multi_select", "yes_no", "numeric", "short", "box"]
"""What is asked for: one option, several options, yes or no, a number, a few words, a place in the image."""

KINDS: tuple[Kind, ...] = ("choice", "multi_select", "yes_no", "numeric", "short", "box")
_KIND_NAMES: dict[str, Kind] = {
    "mcq": "choice", "multiple_choice": "choice", "multi": "multi_select", "multiselect": "multi_select",
    "yesno": "yes_no", "closed": "yes_no", "number": "numeric", "open": "short", "open_ended": "short",
    "short_answer": "short", "short_open": "short", "box_iou": "box", "bbox": "box", "grounding": "box",
}  # fmt: skip
"""How other programs call our kinds."""


def find_kind(name: str) -> Kind | None:
    """The kind that goes by ``name``, ours or another program's, in any case; None when there is none."""
    plain = name.casefold().replace("-", "_").replace("/", "_").replace(" ", "_")
    known: dict[str, Kind] = {kind: kind for kind in KINDS}
    return (known | _KIND_NAMES).get(plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row of a data set: image(s), a question, its options and the right one."""

    id: str
    """Unique within its data set."""
    source: str
    """Name of the data set the row came from, e.g. ``Chest CT Scan``."""
    images: tuple[Path, ...]
    """Image files, in the order the question speaks of them."""
    question: str
    options: tuple[str, ...]
    """Option texts, without their letters; option ``i`` has letter ``LETTERS[i]``. Empty for kinds without options."""
    target: str
    """The right answer. ``choice``: its letter; ``multi_select``: letters, ``A, C``; ``yes_no``: ``yes`` or ``no``;
    ``numeric``: a number and its unit, ``3.5 cm``; ``short``: a few words; ``box``: ``x1, y1, x2, y2``."""
    modality: str = "unknown"
    question_type: str = "unknown"
    patient: str | None = None
    """Pseudonymous key of the patient, volume or region that examples may share; None when unknown."""
    kind: Kind = "choice"
    references: tuple[str, ...] = ()
    """``short``: other answers that are as right as the target."""
    tolerance: str = ""
    """``numeric``: how far off is still right, as ``5 %`` of the target or in a unit, ``2 mm``; empty: not at all."""
    rationale: str | None = None
    """Reasoning that leads to the target, where the source has it: what supervised training may imitate."""

    @property
    def target_text(self) -> str:
        """The right answer in words: the text of the right option where there is one."""
        return self.options[LETTERS.index(self.target)] if self.kind == "choice" else self.target


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What the policy reads: one user turn with the images first and the text after them."""

    id: str
    """The example's id."""
    text: str
    """Text of the user turn, data already neutralised; the chat template is the policy's business."""
    images: tuple[Path, ...]
    mode: Mode

    @property
    def hash(self) -> str:
        """16 hex digits over mode, text and image names: tells whether two records answered the same prompt."""
        parts = "\0".join([self.mode, self.text, *(image.name for image in self.images)])
        return hashlib.sha256(parts.encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the policy wrote for one prompt."""

    text: str
    """Decoded without the end-of-turn token; other special tokens are kept, they are part of what was written."""
    token_ids: tuple[int, ...]
    """(T,) sampled tokens, the end-of-turn token included when there was one."""
    finish_reason: Literal["stop", "length"]
    """``stop``: the policy ended its turn; ``length``: the token limit cut it off."""
    mode: Mode = "think"
    """The form its prompt asked for."""
    sampling_logprobs: tuple[float, ...] = ()
    """(T,) nats, of each token as the sampler saw it (temperature applied, top-k and top-p not)."""

    @property
    def truncated(self) -> bool:
        return self.finish_reason == "length"


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """What a reward says of one completion."""

    value: float
    parts: dict[str, float] = field(default_factory=dict)
    """Unweighted value of each part, by the name of its function."""
    answer: str | None = None
    """What was read from the completion, a letter for a choice; None when it could not be read."""
    explanation: str = ""
    """One sentence: why this value."""


Reward = Callable[[Example, Completion], Score]
"""A reward is a pure function. A malformed completion is worth little; a malformed example is an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One scored completion."""

    completion: Completion
    score: Score
    shaping: float = 0.0
    """What an algorithm adds to the score's value before completions are compared: overlong, KL in the reward."""

    @property
    def reward(self) -> float:
        """What advantages are computed from."""
        return self.score.value + self.shaping


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The rollouts of one prompt: what advantages are computed over."""

    example: Example
    prompt: Prompt
    rollouts: tuple[Rollout, ...]


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of one step, in the sampler's order."""

    items: tuple[Group, ...]
    dropped: tuple[Group, ...] = ()
    """Groups that dynamic sampling drew and left out, because all their rewards were equal."""
    sampled: bool = True
    """Whether a policy wrote the completions and a reward scored them; False for demonstrations."""

    def __iter__(self):
        return iter(self.items)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def rewards(self) -> list[list[float]]:
        """(N, G) reward of every rollout, shaping included."""
        return [[rollout.reward for rollout in group.rollouts] for group in self.items]

    @property
    def rollouts(self) -> list[Rollout]:
        """(N * G,) all rollouts, group by group."""
        return [rollout for group in self.items for rollout in group.rollouts]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One of several completions of a question that was asked more than once."""

    completion: str
    finish_reason: Literal["stop", "length"]
    answer: str | None
    correct: bool
    parts: dict[str, float]
    tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalRecord:
    """One line of ``records.jsonl``: all that any figure about an evaluation is computed from."""

    id: str
    source: str
    modality: str
    question_type: str
    patient: str | None
    images: tuple[str, ...]
    """Image paths relative to the store: the clusters of the bootstrap, and what the report shows."""
    question: str
    options: tuple[str, ...]
    mode: Mode
    prompt_hash: str
    completion: str
    finish_reason: Literal["stop", "length"]
    answer: str | None
    """What was read from the completion, a letter for a choice; None: unreadable, counted as wrong."""
    target: str
    correct: bool
    parts: dict[str, float]
    """Unweighted reward parts, e.g. ``{"choice_correct": 1.0, "well_formed": 1.0}``."""
    tokens: int
    """Completion length in tokens."""
    option_probs: tuple[float, ...] | None = None
    """Probability of each option's letter where the answer stands, given all that was written before it; None for an
    unreadable answer, and where it was not scored."""
    kind: Kind = "choice"
    references: tuple[str, ...] = ()
    tolerance: str = ""
    samples: tuple[Sample, ...] = ()
    """All completions where several were sampled, in the order drawn; the record's own is then the one that stands for
    the majority. Empty where the question was asked once."""


def image_cluster(images: Sequence[str | Path]) -> str:
    """Key under which questions about the same image(s) belong together."""
    return "|".join(str(image) for image in images)


def relative_to(image: Path, root: str | Path | None) -> str:
    """``image`` as written into records: relative to ``root`` where it lies under it, else as it is."""
    return str(image.relative_to(root)) if root is not None and image.is_relative_to(root) else str(image)
