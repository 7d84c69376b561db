"""Settings: a YAML recipe plus ``key=value`` overrides become one frozen, checked record, or an error that helps.

Settings classes live beside the code that reads them (``grpo.settings.GRPO``, ``training.optim.Optim``); this module
holds their base and the one way to load them.
"""

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator
from pydantic_core import ErrorDetails

from medrl.errors import SettingsError

SettingsType = TypeVar("SettingsType", bound="Settings")
Problem = tuple[tuple[str, ...], str]
"""The section a problem is in, e.g. ``("grpo",)``, and the sentence that says what is wrong."""


class InvalidSettings(SettingsError):
    """Settings that were read but cannot mean anything; knows its problems one by one."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(_with_section(section, message) for section, message in problems))


class Settings(BaseModel):
    """Base of all settings: frozen, no unknown names, no NaN; a wrong value raises ``SettingsError``."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        validate_default=True,
        protected_namespaces=(),
    )

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems = [problem for details in error.errors() for problem in _explain(type(self), details)]
            raise InvalidSettings(problems) from None

    @field_validator("*", mode="before")
    @classmethod
    def _a_switch_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        """``group_size: yes`` would otherwise be read as 1."""
        allowed = _members(cls.model_fields[info.field_name or ""].annotation)
        if isinstance(value, bool) and bool not in allowed and {int, float} & set(allowed):
            raise ValueError(f"{info.field_name} is {_yaml_word(value)}, but it must be a number")
        return value


def load_settings(
    cls: type[SettingsType], recipe: Path | str | Mapping[str, Any], overrides: Sequence[str] = ()
) -> SettingsType:
    """Read a recipe, apply overrides such as ``grpo.group_size=8`` (values are YAML), and check the result.

    Raises ``SettingsError`` naming the recipe, the key and what would do: for a missing or malformed file, a key given
    twice, an unknown key, a value of the wrong type or out of range, an override that is not ``key=value``.
    """
    if isinstance(recipe, Mapping):
        source, values = "settings", dict(recipe)
    else:
        source, values = str(recipe), read_recipe(Path(recipe))
    if overrides:
        source = f"{source} with {' '.join(overrides)}"
    for override in overrides:
        values = _override(values, override)
    _check_keys_are_text(values, source)
    try:
        return cls(**values)
    except InvalidSettings as error:
        raise SettingsError("\n".join(f"{source}: {_with_section(*problem)}" for problem in error.problems)) from None


def choose_settings(cls: type[SettingsType], settings: SettingsType | None, options: Mapping[str, Any]) -> SettingsType:
    """``settings``, or ``cls`` of the keyword arguments; SettingsError when both are given."""
    if settings is not None and options:
        raise SettingsError(f"give settings or {', '.join(options)}, not both: put them into the settings")
    return settings if settings is not None else cls(**options)


def dump_settings(settings: Settings) -> dict[str, Any]:
    """Plain types only, so that it can be written as YAML or JSON; ``load_settings`` of it gives the same settings."""
    return settings.model_dump(mode="json")


def with_defaults(values: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    """``values``, as an older version dumped them, with the defaults of what settings like ``settings`` have gained."""
    completed = dict(values)
    for name, field in type(settings).model_fields.items():
        inner = getattr(settings, name)
        if name not in values:
            if not field.is_required():
                completed |= type(settings).model_construct().model_dump(mode="json", include={name})
        elif isinstance(inner, Settings) and isinstance(values[name], Mapping):
            completed[name] = with_defaults(values[name], inner)
    return completed


def read_recipe(path: Path) -> dict[str, Any]:
    """The settings a YAML file lists, unchecked but for its form. Raises ``SettingsError`` when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SettingsError(f"recipe {path} does not exist; give the path of a YAML file{_neighbors(path)}") from None
    except IsADirectoryError:
        raise SettingsError(f"recipe {path} is a folder; give the path of a YAML file{_neighbors(path)}") from None
    except UnicodeDecodeError as error:
        raise SettingsError(f"recipe {path} is not UTF-8 text ({error}): save it as UTF-8") from None
    except OSError as error:
        raise SettingsError(f"recipe {path} cannot be read: {error}") from None
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        duplicate = next(_duplicate_keys(node, "", set()), None) if node else None
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-99-99
        tabs = "; YAML takes no tabs: indent with blanks" if "'\\t'" in str(error) else ""
        raise SettingsError(f"recipe {path} is not valid YAML: {error}{tabs}") from None
    if duplicate:
        raise SettingsError(f"{path}: {duplicate}; keep one of them")
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise SettingsError(f"{path} holds {_given(values)}, but a recipe is a list of 'key: value' lines")
    return values


def _duplicate_keys(node: yaml.Node, path: str, seen: set[int]) -> Iterator[str]:
    """YAML keeps the last of two equal keys without a word, so the tree is searched before it becomes a dict."""
    if id(node) in seen:
        return
    seen.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            yield from _duplicate_keys(child, path, seen)
    if isinstance(node, yaml.MappingNode):
        lines: dict[str, int] = {}
        for key, child in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in lines:
                yield f"'{path}{name}' is given twice, on lines {lines[name]} and {line}"
            lines[name] = line
            yield from _duplicate_keys(child, f"{path}{name}.", seen)


def _override(values: dict[str, Any], override: str) -> dict[str, Any]:
    """A copy of ``values`` with the one dotted key set."""
    key, equals, text = override.partition("=")
    names = key.strip().split(".")
    if not equals or not all(names):
        raise SettingsError(f"override '{override}' is not key=value; write it as in grpo.group_size=8")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        raise SettingsError(f"override '{override}': '{text}' is not valid YAML: {error}") from None
    values = dict(values)
    section = values
    for depth, name in enumerate(names[:-1]):
        inner = section.get(name)
        if isinstance(inner, Settings):
            inner = dump_settings(inner)
        if inner is not None and not isinstance(inner, Mapping):
            parent = ".".join(names[: depth + 1])
            raise SettingsError(f"override '{override}': {parent} is {_given(inner)}, not a section with settings")
        section[name] = dict(inner or {})
        section = section[name]
    section[names[-1]] = value
    return values


def _check_keys_are_text(values: Mapping[Any, Any], source: str) -> None:
    for key, value in values.items():
        if not isinstance(key, str):
            raise SettingsError(f"{source}: the key {_yaml_word(key)} is {_given(key)}; put it in quotes")
        if isinstance(value, Mapping):
            _check_keys_are_text(value, source)


def _explain(cls: type[Settings], details: ErrorDetails) -> list[Problem]:
    """Turn one finding of pydantic into problems in our words."""
    kind, context, value = details["type"], details.get("ctx", {}), details["input"]
    location = tuple(str(part) for part in details["loc"])
    cause = context.get("error")
    if isinstance(cause, InvalidSettings):
        return [((*location, *section), message) for section, message in cause.problems]
    if isinstance(cause, ValueError):
        return [((), str(cause))]
    name = ".".join(location)
    if kind == "extra_forbidden":
        return [((), _unknown(cls, name))]
    if kind == "missing":
        if len(location) > 1:
            return [((), f"{location[0]} is {_given(value)}, but it needs {int(location[1]) + 1} values or more")]
        return [((), f"{cls.__name__} needs the setting '{name}', which is not given")]
    words = _words_or_bool(cls, location[0])
    if words:  # pydantic finds fault once for the words and once for the bool
        message = f"{location[0]} is {_given(value)}, but it must be {', '.join(words)}, true or false"
        return [((), message)] if kind == "literal_error" else []
    return [((), f"{name} is {_given(value)}, but it must be {_expected(cls, location[0], details)}")]


def _words_or_bool(cls: type[Settings], field: str) -> list[str]:
    """The words that a setting allows beside true and false; none where it is not of that kind."""
    members = _members(cls.model_fields[field].annotation)
    words = [word for member in members if get_origin(member) is Literal for word in get_args(member)]
    return words if bool in members else []


def _unknown(cls: type[Settings], name: str) -> str:
    known = sorted(cls.model_fields)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.6)
    hint = f"; did you mean {' or '.join(near)}?" if near else ";"
    return f"{cls.__name__} has no setting '{name}'{hint} it has {', '.join(known) or 'none'}"


EXPECTED = {
    "int": "a whole number",
    "float": "a number",
    "finite": "a finite number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "list": "a list",
    "tuple": "a list",
    "dict": "a section of 'key: value' lines",
    "mapping": "a section of 'key: value' lines",
}
LIMITS = {"ge": "at least", "gt": "greater than", "le": "at most", "lt": "less than"}


def _expected(cls: type[Settings], field: str, details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    for limit, words in LIMITS.items():
        if limit in context:
            return f"{words} {context[limit]}"
    if kind == "literal_error":
        return str(context["expected"])
    if kind.startswith("model"):
        inner = [member for member in _members(cls.model_fields[field].annotation) if _is_settings(member)]
        return f"a section with {', '.join(sorted(inner[0].model_fields))}" if inner else "a section"
    message = details["msg"][:1].lower() + details["msg"][1:]
    return EXPECTED.get(kind.split("_")[0], f"otherwise: {message}")


def _members(annotation: Any) -> tuple[Any, ...]:
    """The types a field allows: ``int | None`` gives ``(int, NoneType)``."""
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(member for part in get_args(annotation) for member in _members(part))
    return (annotation,)


def _is_settings(member: Any) -> bool:
    return isinstance(member, type) and issubclass(member, Settings)


def _given(value: Any) -> str:
    """A value as the person wrote it, with its kind where the two could be confused."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return _yaml_word(value)
    if isinstance(value, str):
        return f"the text '{value}'"
    if isinstance(value, Mapping):
        return f"a section ({', '.join(map(str, value))})"
    if isinstance(value, list | tuple):
        return f"the list {list(value)}"
    return str(value)


def _yaml_word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _with_section(section: tuple[str, ...], message: str) -> str:
    return f"{'.'.join(section)}: {message}" if section else message


def _neighbors(path: Path) -> str:
    folder = path if path.is_dir() else path.parent
    names = sorted(file.name for pattern in ("*.yaml", "*.yml") for file in folder.glob(pattern))
    near = difflib.get_close_matches(path.name, names, n=3, cutoff=0.4) or names[:3]
    return f"; {folder} has {', '.join(near)}" if near else ""
