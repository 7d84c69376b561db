"""Supervised fine-tuning as Med-R1's released script does it, to show what its faults cost. Not for any other use.

    <system: Your task: ...> <user: question, options, then the image> <assistant: "None", blank line, "<answer> C
    </answer>"> and a new assistant turn begun behind it; the loss is on every token but those of the image.

Source: Med-R1's released ``sft.py`` as described in its public repository; no code of it is used.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from medrl.data.images import open_image
from medrl.data.prompts import inline_options, neutralize
from medrl.errors import DataError
from medrl.policy.encoding import Encodes
from medrl.policy.policy import EncodedPrompt, Policy, ScoredCompletions
from medrl.training.batches import Batch, TrainingGroup
from medrl.types import Group, Groups, Prompt

RELEASED = "None\n\n<answer> {letter} </answer>"
"""An f-string over a column that the data do not have wrote the word "None"."""
SYSTEM = "Your task: Provide the correct single-letter choice (A, B, C, D,...) inside <answer>...</answer> tags."


class ReleasedTurns:
    """A policy that reads an example as the released script does; an update takes it in a policy's place.

    An example becomes two groups without a shared token: the text before the image, predicted from its first token, and
    all that follows the image. So the prompt is trained on too, with nothing but ``Policy.logprobs``.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._encoded: dict[str, EncodedPrompt] = {}

    @property
    def model(self) -> Any:
        return self.policy.model

    @property
    def family(self) -> Any:
        return self.policy.family

    @property
    def encoder(self) -> None:
        """None: nothing is encoded ahead."""

    @property
    def device(self) -> torch.device:
        return self.policy.device

    def tokenize(self, completion: str) -> list[int]:
        """Token ids of an answer, its end of turn, and the next turn's beginning."""
        tokenizer = self.policy.processor.tokenizer
        trailing = tokenizer("\n<|im_start|>assistant\n", add_special_tokens=False)["input_ids"]
        return [*self.policy.tokenize(completion), *trailing]

    def prepare(self, prompt: Prompt, encoder: Encodes) -> None:
        """Nothing: its turns are not a policy's, and are made in ``pack``."""

    def encode(self, prompts: Sequence[Prompt]) -> list[EncodedPrompt]:
        return [self._encoded[prompt.id] for prompt in prompts]

    def logprobs(
        self, encoded: Sequence[EncodedPrompt], completions: Any, *, temperature: float = 1.0
    ) -> ScoredCompletions:
        return self.policy.logprobs(encoded, completions, temperature=temperature)

    def pack(self, groups: Groups) -> Batch:
        """Two training groups per example."""
        self._encoded = {}
        return tuple(part for group in groups for part in self._parts(group))

    def _parts(self, group: Group) -> list[TrainingGroup]:
        example, answer = group.example, group.rollouts[0].completion.token_ids
        if len(example.images) != 1:
            raise DataError(
                f"example {example.id!r} has {len(example.images)} images, but the released script knows only "
                "questions with one: set sft.emulate to none"
            )
        turn = self._turn(group)
        start, end = self._image_span(turn.token_ids)
        token_ids = turn.token_ids.tolist()
        before = self._part(group, "before the image", turn, 1, tuple(token_ids[1:start]))
        after = self._part(group, "after the image", turn, end, (*token_ids[end:], *answer))
        return [before, after]

    def _part(
        self, group: Group, name: str, turn: EncodedPrompt, length: int, labels: tuple[int, ...]
    ) -> TrainingGroup:
        shows_image = length > 1
        prompt = Prompt(id=f"{group.example.id} ({name})", text=group.prompt.text, images=(), mode=group.prompt.mode)
        self._encoded[prompt.id] = EncodedPrompt(
            id=prompt.id,
            token_ids=turn.token_ids[:length],
            positions=turn.positions[:, :length],
            pixels=turn.pixels if shows_image else None,
            grids=turn.grids if shows_image else turn.grids[:0],
        )
        return TrainingGroup(prompt=prompt, completions=(labels,), advantages=(1.0,), sampling_logprobs=())

    def _turn(self, group: Group) -> EncodedPrompt:
        """System, user (text, then image), assistant begun."""
        example, policy = group.example, self.policy
        question = neutralize(inline_options(example.question, example.options))
        messages = [
            {"role": "system", "content": [{"type": "text", "text": SYSTEM}]},
            {"role": "user", "content": [{"type": "text", "text": question}, {"type": "image"}]},
        ]
        text = policy.processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [open_image(path) for path in example.images]
        inputs = policy.processor(text=[text], images=images, return_tensors="pt")
        token_ids, grids = inputs["input_ids"][0], inputs["image_grid_thw"]
        return EncodedPrompt(
            id=example.id,
            token_ids=token_ids,
            positions=policy.family.positions(token_ids, grids),
            pixels=inputs["pixel_values"],
            grids=grids,
        )

    def _image_span(self, token_ids: Tensor) -> tuple[int, int]:
        """Where the image's tokens begin and where the text goes on behind them."""
        to_id = self.policy.processor.tokenizer.convert_tokens_to_ids
        ids = token_ids.tolist()
        return ids.index(to_id("<|vision_start|>")), ids.index(to_id("<|vision_end|>")) + 1
