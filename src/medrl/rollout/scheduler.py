"""Which completions are written together.

Every completion is a row at a token of its own (rollout/rows.py). Once a quarter of the rows has ended, waiting prompts
take their places, or, where none waits, the batch becomes smaller: a long completion does not hold the others. On a GPU
a step is a captured graph (rollout/captured.py).
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from medrl import stopping
from medrl.phases import phase
from medrl.policy.policy import EncodedPrompt, Policy
from medrl.rollout.captured import CapturedDecoder, Graphs, bucket
from medrl.rollout.decoder import Decoder
from medrl.rollout.prefill import prefill
from medrl.rollout.rows import Part, Rows, Shape, begin, regroup
from medrl.rollout.sampling import Sampling, uniforms
from medrl.types import Completion, Prompt

REGROUP_AT = 0.75
"""Rows are regrouped once no more than this share of them is still writing, as buckets of 48 and 64 rows are apart."""
CHECK_EVERY = {"cpu": 1, "cuda": 8}
"""Tokens between two looks at who has ended: on a GPU each look waits for all work that was handed over."""

Encode = Callable[[Sequence[int]], list[EncodedPrompt]]
"""Makes prompts ready, given which of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A prompt with all its completions."""

    number: int
    """Which of the prompts given."""
    encoded: EncodedPrompt
    completions: list[Completion]


@dataclass(slots=True)
class Tally:
    """What completing cost, counted as it goes."""

    decode_steps: int = 0
    """Passes that wrote one token more for every row."""
    decode_rows: int = 0
    """Rows in them, those that had ended included."""


@dataclass(frozen=True, slots=True)
class How:
    """What stays the same while prompts are completed."""

    policy: Policy
    prompts: Sequence[Prompt]
    sampling: Sampling
    group_size: int
    seed: int
    step: int
    encode: Encode
    tally: Tally


@dataclass(slots=True, eq=False)
class _Asked:
    """A prompt that is being completed."""

    number: int
    encoded: EncodedPrompt
    slot: int
    """Where its keys are among those of the batch."""
    completions: dict[int, Completion] = field(default_factory=dict)


_Seat = tuple[_Asked, int]
"""Whose row it is: a prompt, and which of its completions."""


@dataclass(slots=True)
class _Batch:
    """Rows, and whose they are; rows that only fill a buffer up stand behind these."""

    rows: Rows
    seats: list[_Seat]


def schedule(how: How, numbers: Sequence[int], at_once: int) -> Iterator[list[Finished]]:
    """Complete these prompts, ``at_once`` times the group size of rows at a time.

    Raises ``torch.OutOfMemoryError`` where that is too much.
    """
    waiting = deque(numbers)
    most = Shape(
        rows=at_once * how.group_size,
        # A prompt whose last completion is long keeps its place; half as many others may come meanwhile.
        prompts=min(at_once * how.group_size, at_once + at_once // 2, len(numbers)),
        prompt_tokens=0,
        group_size=how.group_size,
    )
    batch: _Batch | None = None
    while waiting or batch:
        parts = [_settle(how, batch)] if batch else []
        writing = [seat for part in parts for seat in part.seats]
        slots = most.prompts - len({asked.number for asked, _ in writing})
        places = min(slots, (most.rows - len(writing)) // how.group_size, len(waiting))
        if places:
            parts.append(_settle(how, _begin(how, [waiting.popleft() for _ in range(places)])))
        finished = [one for part in parts for one in part.finished]
        batch = _join(how, parts, most) if any(part.seats for part in parts) else None
        if finished:
            yield finished
        if batch:
            _write(how, batch, more=bool(waiting))


def _begin(how: How, numbers: Sequence[int]) -> _Batch:
    """Rows of these prompts with their first tokens."""
    policy, limit = how.policy, how.sampling.max_new_tokens
    encoded = how.encode(numbers)
    draws = [
        uniforms(how.seed, how.step, how.prompts[number].id, index, limit)
        for number in numbers
        for index in range(how.group_size)
    ]
    with phase("prefill"):
        stopping.check()
        logits, prompts = prefill(policy, encoded)  # (N, V)
        uniform = torch.from_numpy(np.stack(draws)).to(policy.device)  # (N * G, limit)
        rows = begin(prompts, [prompt.next_position for prompt in encoded], uniform)
        Decoder(policy, how.sampling, rows).draw(logits.repeat_interleave(how.group_size, dim=0))
    asked = [_Asked(number, prompt, slot) for slot, (number, prompt) in enumerate(zip(numbers, encoded, strict=True))]
    return _Batch(rows, [(one, index) for one in asked for index in range(how.group_size)])


@dataclass(frozen=True, slots=True)
class _Settled:
    """What is left of a batch."""

    rows: Rows
    kept: list[int]
    """Rows that still write."""
    seats: list[_Seat]
    """Whose these are."""
    finished: list[Finished]


def _settle(how: How, batch: _Batch) -> _Settled:
    """Take out the completions that have ended."""
    rows = batch.rows
    over = rows.ended[: len(batch.seats)].tolist()
    ended = torch.tensor([row for row, is_over in enumerate(over) if is_over], dtype=torch.long, device=rows.t.device)
    found = [getattr(rows, name)[ended].tolist() for name in ("t", "written", "logprobs")]
    finished = []
    for (asked, index), length, token_ids, values in zip(
        [seat for seat, is_over in zip(batch.seats, over, strict=True) if is_over], *found, strict=True
    ):
        asked.completions[index] = _completion(how, asked, token_ids[:length], values[:length])
        if len(asked.completions) == how.group_size:
            completions = [asked.completions[n] for n in range(how.group_size)]
            finished.append(Finished(number=asked.number, encoded=asked.encoded, completions=completions))
    kept = [row for row, is_over in enumerate(over) if not is_over]
    return _Settled(rows, kept, [batch.seats[row] for row in kept], finished)


def _completion(how: How, asked: _Asked, token_ids: list[int], logprobs: list[float]) -> Completion:
    return Completion(
        text=how.policy.decode(token_ids),
        token_ids=tuple(token_ids),
        finish_reason="stop" if token_ids[-1] in how.policy.stop_token_ids else "length",
        mode=how.prompts[asked.number].mode,
        sampling_logprobs=tuple(logprobs),
    )


def _join(how: How, parts: Sequence[_Settled], most: Shape) -> _Batch:
    """All that still write as one batch."""
    seats = [seat for part in parts for seat in part.seats]
    asked = [list(dict.fromkeys(one for one, _ in part.seats)) for part in parts]
    pieces = [
        Part(part.rows, part.kept, [one.slot for one in here]) for part, here in zip(parts, asked, strict=True) if here
    ]
    together = [one for here in asked for one in here]
    for slot, one in enumerate(together):
        one.slot = slot
    group = [one.slot for one, _ in seats]
    if _static(parts[0].rows.t.device):
        longest = max(part.rows.prompts.padding.shape[-1] for part in parts)  # never less than before
        shape = _graphs(how.policy).room(how.sampling, replace(most, prompt_tokens=longest))
        shape = replace(shape, rows=bucket(len(group), shape.rows))
    else:
        shape = Shape(
            rows=len(group),
            prompts=len(together),
            prompt_tokens=max(len(one.encoded.token_ids) for one in together),
            group_size=max(Counter(group).values()),
        )
    return _Batch(regroup(pieces, group, shape), seats)


def _write(how: How, batch: _Batch, *, more: bool) -> None:
    """Write on until enough rows have ended for others to come (``more`` wait) or for a smaller batch."""
    count, size, device = len(batch.seats), len(batch.rows.t), batch.rows.t.device
    every = CHECK_EVERY.get(device.type, 1)
    with phase("decode"):
        decoder = _open(how.policy, how.sampling, batch.rows)
        batch.rows = decoder.rows
        while True:
            for _ in range(every):
                stopping.check()  # between two steps, so that a capture is always whole
                decoder.step()
            how.tally.decode_steps += every
            how.tally.decode_rows += every * size
            writing = count - int(decoder.rows.ended[:count].sum())
            smaller = bucket(writing, size) if _static(device) else writing
            if writing == 0 or smaller <= REGROUP_AT * size or (more and writing <= REGROUP_AT * count):
                return


def _static(device: torch.device) -> bool:
    """Whether shapes must not follow the tokens, as steps are captured."""
    return device.type == "cuda"


def _open(policy: Policy, sampling: Sampling, rows: Rows) -> Decoder | CapturedDecoder:
    return _graphs(policy).open(sampling, rows) if _static(policy.device) else Decoder(policy, sampling, rows)


def _graphs(policy: Policy) -> Graphs:
    if not isinstance(policy.decode_graphs, Graphs):
        policy.decode_graphs = Graphs(policy)
    return policy.decode_graphs
