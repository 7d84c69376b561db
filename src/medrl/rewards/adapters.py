"""Our rewards in the form that other trainers call, and theirs as parts of ours.

    TRL      f(prompts, completions, **columns) -> list of float            columns: of the data set, one value per row
    verl     f(data_source, solution_str, ground_truth, extra_info) -> float or {"score": ..., ...}
    EasyR1   f(reward_inputs) -> {"overall": ..., ...}, of one input or a list of them

What a reward needs to know of an example travels in the columns that `columns_of` gives, or as JSON in one column
``medrl``. EasyR1 passes only the right answer on, so there that JSON is the
``ground_truth`` (``data.answer_key: medrl``).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, cast

from medrl.errors import RewardError
from medrl.rewards.combine import PartFunction
from medrl.rewards.guard import guarded
from medrl.types import MODES, Completion, Example, Kind, Mode, Reward, Score

OWN_COLUMN = "medrl"
"""A column that holds an example as one JSON object."""
COLUMNS = ("id", "source", "question", "options", "target", "kind", "mode", "references", "tolerance")


def columns_of(example: Example, mode: Mode) -> dict[str, Any]:
    """What a row of another trainer's data set has to hold for `as_trl`, `as_verl` and `as_easyr1`; plain JSON."""
    row = {name: getattr(example, name) for name in COLUMNS if name != "mode"} | {"mode": mode}
    return {name: list(row[name]) if isinstance(row[name], tuple) else row[name] for name in COLUMNS}


def as_trl(reward: Reward, mode: Mode = "think") -> Callable[..., list[float]]:
    """``reward`` as an entry of TRL's ``reward_funcs``; ``mode`` is what rows that name none were asked for.

    Completions are texts or conversations. Raises `RewardError` naming the example as `guarded` does.
    """
    judge = guarded(reward)

    def medrl_reward(prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        values = []
        for index, completion in enumerate(completions):
            row = {name: columns[name][index] for name in (*COLUMNS, OWN_COLUMN) if name in columns}
            values.append(judge(*_sample(row, _text_of(completion), mode)).value)
        return values

    return medrl_reward


def as_verl(reward: Reward, mode: Mode = "think") -> Callable[..., dict[str, float]]:
    """``reward`` as verl's ``compute_score``: ``score`` and the parts. ``mode`` as in `as_trl`.

    ``ground_truth`` is the target, ``extra_info`` holds the other columns of `columns_of`, or ``medrl``.
    """
    judge = guarded(reward)

    def compute_score(
        data_source: str, solution_str: str, ground_truth: str, extra_info: Mapping[str, Any] | None = None, **_: Any
    ) -> dict[str, float]:
        row = {"source": data_source, **(extra_info or {}), "target": ground_truth}
        score = judge(*_sample(row, solution_str, mode))
        return {"score": score.value, **_parts_of(score)}

    return compute_score


def as_easyr1(reward: Reward, mode: Mode = "think") -> Callable[..., Any]:
    """``reward`` as EasyR1's reward function, for ``reward_type: sequential`` and ``batch`` alike.

    ``ground_truth`` is the example as JSON: `columns_of`, or the ``medrl`` column. ``mode`` as in `as_trl`.
    """
    judge = guarded(reward)

    def one(reward_input: Mapping[str, Any]) -> dict[str, float]:
        score = judge(*_sample({OWN_COLUMN: reward_input["ground_truth"]}, reward_input["response"], mode))
        return {"overall": score.value, **_parts_of(score)}

    def compute_score(reward_inputs: Any, **_: Any) -> Any:
        return one(reward_inputs) if isinstance(reward_inputs, Mapping) else [one(given) for given in reward_inputs]

    return compute_score


def from_trl(function: Callable[..., Sequence[float | None]], *, conversational: bool = False) -> PartFunction:
    """A TRL reward function as a part, called with one completion at a time.

    ``conversational``: completions as ``[{"role": "assistant", "content": text}]``, as TRL's own functions want them.
    It gets the columns of `columns_of`, and the target also as ``solution`` and ``answer``. The part raises
    `RewardError` naming the example when the list that comes back has not one number in it.
    """

    def part(example: Example, completion: Completion) -> float:
        text = completion.text
        asked = [[{"role": "assistant", "content": text}]] if conversational else [text]
        columns = {name: [value] for name, value in _known_names(columns_of(example, completion.mode)).items()}
        prompts = [[{"role": "user", "content": example.question}]] if conversational else [example.question]
        values = function(prompts=prompts, completions=asked, **columns)
        if not isinstance(values, Sequence) or len(values) != 1:
            count = len(values) if isinstance(values, Sequence) else f"a {type(values).__name__} of"
            raise RewardError(f"{_name(function)} on example {example.id!r} returned {count} values for 1 completion")
        return _number(values[0], function, example)

    return _named_like(part, function)


def from_verl(function: Callable[..., float | Mapping[str, Any]]) -> PartFunction:
    """verl's ``compute_score`` as a part: its number, or the ``score`` of its dictionary."""

    def part(example: Example, completion: Completion) -> float:
        extra_info = columns_of(example, completion.mode)
        result = function(example.source, completion.text, example.target, extra_info)
        return _number(result["score"] if isinstance(result, Mapping) else result, function, example)

    return _named_like(part, function)


def from_easyr1(function: Callable[..., Any], *, batch: bool = False) -> PartFunction:
    """EasyR1's reward function as a part: its ``overall``. ``batch``: it takes a list of inputs."""

    def part(example: Example, completion: Completion) -> float:
        given = {
            "response": completion.text,
            "response_length": len(completion.token_ids),
            "ground_truth": example.target,
        }
        result = function([given]) if batch else function(given)
        if batch:
            if not isinstance(result, Sequence) or len(result) != 1:
                raise RewardError(f"{_name(function)} on example {example.id!r} must return 1 score for 1 completion")
            result = result[0]
        return _number(result["overall"], function, example)

    return _named_like(part, function)


def _sample(row: Mapping[str, Any], text: str, usual_mode: Mode) -> tuple[Example, Completion]:
    if OWN_COLUMN in row:
        row = {**_parse_own(row[OWN_COLUMN]), **row}
    mode = row.get("mode") or usual_mode
    if "target" not in row or mode not in MODES:
        problem = f"has mode {mode!r}, but the modes are {', '.join(MODES)}" if "target" in row else "has no target"
        raise RewardError(
            f"row {row.get('id', '')!r} {problem}; medrl.rewards.adapters.columns_of gives what is needed"
        )
    example = Example(
        id=str(row.get("id", "")),
        source=str(row.get("source", "")),
        images=(),
        question=str(row.get("question", "")),
        options=_listed(row.get("options")),
        target=row["target"],
        kind=cast(Kind, row.get("kind") or "choice"),
        references=_listed(row.get("references")),
        tolerance=row.get("tolerance") or "",
    )
    return example, Completion(text=text, token_ids=(), finish_reason="stop", mode=cast(Mode, mode))


def _listed(values: Any) -> tuple[str, ...]:
    # A data frame holds lists as arrays of numpy, which are neither true nor false.
    return () if values is None else tuple(map(str, values))


def _parse_own(text: Any) -> dict[str, Any]:
    try:
        own = json.loads(text)
    except (TypeError, ValueError):
        own = None
    if not isinstance(own, dict):
        raise RewardError(
            f"{text!r:.80} is not an example as JSON; medrl.rewards.adapters.columns_of gives what is needed"
        )
    return own


def _text_of(completion: Any) -> str:
    """Text of a completion as TRL has it: itself, or the content of its messages."""
    if isinstance(completion, str):
        return completion
    contents = [message["content"] for message in completion]
    return "".join(
        content if isinstance(content, str) else "".join(piece.get("text", "") for piece in content)
        for content in contents
    )


def _parts_of(score: Score) -> dict[str, float]:
    return {name: value for name, value in score.parts.items() if name not in ("score", "overall")}


def _known_names(columns: dict[str, Any]) -> dict[str, Any]:
    return {**columns, "solution": columns["target"], "answer": columns["target"]}


def _number(value: Any, function: Callable[..., Any], example: Example) -> float:
    if not isinstance(value, Real):
        raise RewardError(f"{_name(function)} on example {example.id!r} returned {value!r:.80}; it must be a number")
    return float(value)


def _named_like(part: PartFunction, function: Callable[..., Any]) -> PartFunction:
    part.__name__ = _name(function)
    return part


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__name__", type(function).__name__)
