"""Names of models that are not folders or hub ids."""

from importlib.resources import files
from pathlib import Path

from medrl.errors import PolicyError

DEMO_BASE = "demo-base"


def resolve_model(model: str) -> str:
    """What ``Policy.load`` opens for ``model``: the shipped folder for ``demo-base``, anything else unchanged.

    Raises ``PolicyError`` when this installation was packed without the demo's base model.
    """
    if model != DEMO_BASE:
        return model
    folder = Path(str(files("medrl").joinpath("demo", "base")))
    if not (folder / "config.json").is_file():
        raise PolicyError(
            f"this installation has no {DEMO_BASE} ({folder} holds no model): install medrl from its repository, or "
            "make one with 'medrl demo --rebuild-base' and give its folder"
        )
    return str(folder)
