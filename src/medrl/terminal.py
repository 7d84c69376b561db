"""What the command line prints, and how it ends when something is wrong."""

import json
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from medrl.errors import MedrlError
from medrl.stopping import Stopped

INTERRUPTED = {
    "train": "stopped; continue from the newest checkpoint with the same command and --resume auto",
    "eval": "stopped; the same command continues where it stopped",
    "demo": "stopped; the same command continues where it stopped",
    "study": "stopped; the same command continues where it stopped",
}
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
"""The option of every command whose answer a program may read."""
EXIT_NO, EXIT_SAVED, EXIT_INTERRUPTED = 3, 143, 130


class Commands(TyperGroup):
    """The commands of medrl: what a user can cure ends as one clear message and an exit code, not as a traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", module=r"(torch|transformers|huggingface_hub|PIL)\b")
                warnings.showwarning = _show_warning
                return super().invoke(ctx)
        except MedrlError as error:
            fail(str(error), error.exit_code)
        except Stopped as reason:
            why = f"{reason}: " if str(reason) else ""
            goes_on = INTERRUPTED.get(ctx.invoked_subcommand or "")
            if goes_on is None:  # e.g. plan, which trains a few steps to measure them
                fail(f"{why}stopped; nothing was kept", EXIT_INTERRUPTED, prefix="")
            fail(f"{why}saved and {goes_on}", EXIT_SAVED, prefix="")
        except KeyboardInterrupt:
            fail(INTERRUPTED.get(ctx.invoked_subcommand or "", "stopped"), EXIT_INTERRUPTED, prefix="")
        except BrokenPipeError:  # whoever read our output has gone, e.g. head: typer ends quietly
            raise
        except OSError as error:
            place = f": {error.filename}" if error.filename else ""
            fail(f"{error.strerror or error}{place}", 1)


def fail(message: str, code: int, *, prefix: str = "error: ") -> None:
    """Print to stderr and end the program."""
    typer.echo(prefix + message, err=True)
    raise typer.Exit(code)


def quiet_libraries() -> None:
    """Keep transformers' bars and notes off the terminal; errors, the hub's download bars and our own notes show."""
    import logging

    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    ours = logging.getLogger("medrl")
    ours.setLevel(logging.INFO)
    if not ours.handlers:
        ours.addHandler(_handler())


def _handler() -> Any:
    import logging

    class ToStderr(logging.Handler):
        """Prints what medrl chose by itself, e.g. a back end, to whatever stderr is at the time."""

        def emit(self, record: logging.LogRecord) -> None:
            typer.echo(record.getMessage(), err=True)

    return ToStderr()


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A table on stdout; the first column is text, the others are numbers. Cells are text, never markup."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(str(cell)) for cell in row))
    console = Console(file=sys.stdout, highlight=False)
    console.print(Text(title), soft_wrap=True)  # as a title of the table it would be cut to the table's width
    console.print(table)


def print_json(value: object) -> None:
    """``value`` on stdout, for programs."""
    typer.echo(json.dumps(value, indent=2, default=str))


def percent(share: float | None) -> str:
    """``0.5`` -> ``50.0 %``; a dash for what is not known."""
    return "-" if share is None else f"{100 * share:.1f} %"


def accuracy_row(name: str, accuracy: Mapping[str, Any]) -> tuple[str, str, str, int]:
    """One line of an accuracy table: name, share, its 95 % interval, number of examples."""
    interval = "-" if accuracy["low"] is None else f"{percent(accuracy['low'])} to {percent(accuracy['high'])}"
    return name, percent(accuracy["value"]), interval, accuracy["n"]


def difference_row(name: str, difference: Mapping[str, Any]) -> tuple[str, str, str, int]:
    """The same for a difference of two accuracies, in points."""
    value, low, high = (
        None if (end := difference[key]) is None else f"{100 * end:+.1f}" for key in ("value", "low", "high")
    )
    return name, f"{value or '-'} points", "-" if low is None else f"{low} to {high}", difference["n"]


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    typer.echo(f"warning: {message}", err=True)
