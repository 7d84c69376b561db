"""A reward is a pure function of an example and a completion. Score three completions; one part is your own."""

from medrl import Completion, Example
from medrl.rewards import check_gold, choice_correct, weighted, well_formed

example = Example(
    id="ct-0001",
    source="made up",
    images=(),
    question="Which modality is this?",
    options=("MRI", "CT", "Ultrasound"),
    target="B",
)


def brief(example: Example, completion: Completion) -> float:
    """1 for at most 60 words, falling to 0 at 120."""
    return min(1.0, max(0.0, (120 - len(completion.text.split())) / 60))


reward = weighted((1.0, choice_correct), (1.0, well_formed), (0.5, brief))
assert check_gold(reward, [example], "think") == [], "a right answer must earn the full reward"

for text in (
    "<think>Bone is bright and the table shows below the patient.</think><answer>B</answer>",
    "<think>Bone is bright.</think> The answer is CT.",
    "<answer>A or B</answer>",
):
    score = reward(example, Completion(text=text, token_ids=(), finish_reason="stop"))
    print(f"{score.value:.2f}  {score.explanation}\n      {text}")
