"""How pages are made from templates: everything escaped, nothing hidden, nothing undefined."""

from jinja2 import Environment, PackageLoader, StrictUndefined

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
