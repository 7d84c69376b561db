"""What a recipe says of its reward -> the reward.

reward: {choice_correct: 1.0, well_formed: 1.0}        parts and their weights
reward: my_rewards.py:lesion_size                      a function of your own: (example, completion) -> Score or number
reward: {answer_correct: 1.0, my_rewards.py:brief: 0.2}   both
reward: {by_source: {VQA-RAD: {answer_correct: 1.0}, default: {choice_correct: 1.0}}}
"""

import difflib
import hashlib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from medrl.errors import SettingsError
from medrl.rewards.combine import PARTS, BySource, find_part, weighted
from medrl.rewards.guard import renaming_errors
from medrl.types import Kind, Reward

BY_SOURCE = "by_source"
DEFAULT = "default"


def default_weights(kinds: Iterable[Kind]) -> dict[str, float]:
    """Parts and weights for questions of these kinds where nothing else is asked for: right answer and right form."""
    right = "choice_correct" if set(kinds) <= {"choice"} else "answer_correct"
    return {right: 1.0, "well_formed": 1.0}


def make_reward(spec: str | Mapping[str, Any], folders: Sequence[Path] = (Path(),)) -> Reward:
    """The reward that a recipe describes; files of functions are looked for in ``folders``, in order.

    Raises `SettingsError` naming what is unknown, missing or not callable, and what would do.
    """
    if isinstance(spec, str):
        return load_function(spec, folders)
    if BY_SOURCE not in spec:
        return weighted(
            *(
                (weight, load_function(name, folders) if ":" in name else find_part(name))
                for name, weight in spec.items()
            )
        )
    sources = spec[BY_SOURCE]
    if len(spec) > 1 or not isinstance(sources, Mapping) or not sources:
        raise SettingsError(
            "reward.by_source stands alone and maps each source to a reward, e.g. "
            "{by_source: {VQA-RAD: {answer_correct: 1.0}, default: {choice_correct: 1.0}}}"
        )
    wrong = [name for name, given in sources.items() if not isinstance(given, str | Mapping) or BY_SOURCE in given]
    if wrong:
        raise SettingsError(f"reward.by_source.{wrong[0]} must be parts with weights, or FILE.py:FUNCTION")
    rewards = {str(name): make_reward(given, folders) for name, given in sources.items()}
    default = rewards.pop(DEFAULT, None)
    return BySource(rewards, default)


def load_function(path: str, folders: Sequence[Path] = (Path(),)) -> Callable[..., Any]:
    """The function that ``FILE.py:NAME`` or ``package.module:NAME`` names. Loading it runs that file.

    Raises `SettingsError` when the file, module or name does not exist, the file fails, or the function does not take
    ``(example, completion)``.
    """
    place, _, name = path.rpartition(":")
    if not place or not name.isidentifier():
        raise SettingsError(f"reward {path!r} is neither a part ({', '.join(PARTS)}) nor FILE.py:FUNCTION")
    module = _load(place, path, folders)
    function = getattr(module, name, None)
    if function is None:
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
        raise SettingsError(f"{place} has no {name}{f'; did you mean {near[0]}?' if near else ''}")
    if not callable(function) or not _takes_two(function):
        raise SettingsError(
            f"{path} cannot be called with (example, completion); a function of another trainer's form goes through "
            "medrl.rewards.adapters: from_trl, from_verl, from_easyr1"
        )
    return function


def describe_files(spec: str | Mapping[str, Any], folders: Sequence[Path] = (Path(),)) -> dict[str, str]:
    """sha256 of each file of functions that a recipe's reward names: what a run's provenance keeps of them."""
    if isinstance(spec, str):
        place = spec.rpartition(":")[0]
        file = _find_file(place, folders) if place.endswith(".py") else None
        return {place: hashlib.sha256(file.read_bytes()).hexdigest()} if file else {}
    found: dict[str, str] = {}
    for name, given in spec.items():
        found |= describe_files(given if isinstance(given, str | Mapping) else str(name), folders)
    return found


def locate_files(spec: str | Mapping[str, Any], folders: Sequence[Path]) -> str | dict[str, Any]:
    """The same reward with each file of functions named by where it lies, found as ``make_reward`` finds it: it then
    means the same without ``folders``."""
    if isinstance(spec, str):
        place, _, name = spec.rpartition(":")
        file = _find_file(place, folders) if place.endswith(".py") else None
        return f"{file}:{name}" if file else spec
    return {
        str(locate_files(str(name), folders)): locate_files(given, folders)
        if isinstance(given, str | Mapping)
        else given
        for name, given in spec.items()
    }


def _load(place: str, path: str, folders: Sequence[Path]) -> ModuleType:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        file = _find_file(place, folders)
        if file is None:
            looked = ", ".join(str(folder.resolve()) for folder in folders)
            raise SettingsError(f"reward {path}: there is no file {place} in {looked}")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None and spec.loader is not None  # it ends in .py
        module = importlib.util.module_from_spec(spec)
        with renaming_errors(f"reward {path}: the file fails with", SettingsError):
            spec.loader.exec_module(module)
        return module
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"reward {path}: there is no module {error.name}; give FILE.py:FUNCTION or install it"
        ) from error


def _find_file(place: str, folders: Sequence[Path]) -> Path | None:
    return next((folder / place for folder in folders if (folder / place).is_file()), None)


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature to look at
        return True
    return True
