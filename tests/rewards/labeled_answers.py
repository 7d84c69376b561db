"""The hand-labeled completions of labeled_completions.yaml, as tuples for parametrized tests."""

from pathlib import Path

import yaml

_TABLE = yaml.safe_load((Path(__file__).parent / "labeled_completions.yaml").read_text(encoding="utf-8"))
_OPTIONS = {name: tuple(options) for name, options in _TABLE["options"].items()}


def _options_of(row: dict) -> tuple[str, ...]:
    return _OPTIONS[row["options"]] if isinstance(row["options"], str) else tuple(row["options"])


IMAGING = _OPTIONS["imaging"]
BLOCKS = [(row["why"], _options_of(row), row["block"], row["answer"]) for row in _TABLE["blocks"]]
"""What stands inside a well formed answer block: (why, options, text of the block, letter or None)."""
COMPLETIONS = [(row["why"], row["mode"], row["text"], row["answer"], row["form"]) for row in _TABLE["completions"]]
"""Whole completions over `IMAGING`: (why, mode, text, letter or None, well formed)."""
