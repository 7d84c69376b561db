"""How pages are made from templates: everything escaped, nothing hidden, nothing undefined."""

import base64
import hashlib
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medrl.report import text


def page_environment() -> Environment:
    """The templates of this package, with our filters. What data and models wrote is text in it, never markup."""
    environment = Environment(
        loader=PackageLoader("medrl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: text.visible(value) if type(value) is str else value,
    )
    environment.filters.update(
        percent=text.percent,
        percent_range=text.percent_range,
        points=text.points,
        points_range=text.points_range,
        p_value=text.p_value,
    )
    return environment


def filter_script() -> dict[str, Any]:
    """``script``, the one that filters test items, and ``script_hash``, by which a page's policy lets it run."""
    script = (Path(__file__).parent / "templates" / "filters.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": Markup(script), "script_hash": digest}  # ours, from this package
