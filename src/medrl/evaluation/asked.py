"""How an evaluation was asked, as far as it decides the answers besides the weights, and where two differ in it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from medrl.runs import ASKED


def read_how(folder: Path) -> dict[str, str]:
    """What ``asked.json`` of an evaluation folder says, by the names of the command's options; empty where it says
    nothing, as in a folder of an earlier version."""
    if folder.suffix == ".jsonl":  # a file of records stands for its folder
        folder = folder.parent
    file = folder / ASKED
    asked: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    size, sampling = asked.get("image_size") or {}, asked.get("sampling")
    drawn = ", ".join(f"{name} {value}" for name, value in sampling.items()) if sampling else "greedy"
    how = {
        "dtype": str(asked["dtype"]).removeprefix("torch.") if asked.get("dtype") else None,
        "min_pixels": size.get("shortest_edge"),
        "max_pixels": size.get("longest_edge"),
        "max_new_tokens": asked.get("max_new_tokens"),
        "sampling": drawn if "max_new_tokens" in asked else None,
        "store": str(asked["store_fingerprint"])[:12] if asked.get("store_fingerprint") else None,
        "scorer": asked.get("rescored_by") or ("strict" if asked else None),
    }
    return {name: str(value) for name, value in how.items() if value is not None}


def differing(a: Mapping[str, str], b: Mapping[str, str]) -> tuple[str, ...]:
    """What is known of both and differs, as ``name (of a, of b)``."""
    return tuple(f"{name} ({a[name]}, {b[name]})" for name in a if name in b and a[name] != b[name])
