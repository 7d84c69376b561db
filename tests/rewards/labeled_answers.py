"""The hand-labeled completions of labeled_completions.yaml, as tuples for parametrized tests."""

from pathlib import Path

import yaml

from medrl.types import Example

_TABLE = yaml.safe_load((Path(__file__).parent / "labeled_completions.yaml").read_text(encoding="utf-8"))
_OPTIONS = {name: tuple(options) for name, options in _TABLE["options"].items()}


def _options_of(row: dict) -> tuple[str, ...]:
    options = row.get("options", ())
    return _OPTIONS[options] if isinstance(options, str) else tuple(options)


IMAGING = _OPTIONS["imaging"]
BLOCKS = [(row["why"], _options_of(row), row["block"], row["answer"]) for row in _TABLE["blocks"]]
"""What stands inside a well formed answer block: (why, options, text of the block, letter or None)."""
COMPLETIONS = [(row["why"], row["mode"], row["text"], row["answer"], row["form"]) for row in _TABLE["completions"]]
"""Whole completions over `IMAGING`: (why, mode, text, letter or None, well formed)."""
KINDS_OF_ANSWERS = [
    (
        row["why"],
        Example(
            id=f"{row['kind']}-{number}",
            source="labeled by hand",
            images=(),
            question="What is it?",
            options=_options_of(row),
            target=row["target"],
            kind=row["kind"],
            references=tuple(row.get("references", ())),
            tolerance=row.get("tolerance", ""),
        ),
        row["block"],
        row["answer"],
        row["right"],
    )
    for number, row in enumerate(_TABLE["kinds"])
]
"""Answers to other kinds of question: (why, example, text of the block, what is read or None, whether it is right)."""
