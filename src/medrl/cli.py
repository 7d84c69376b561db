"""The command line: the table of commands. Each calls one function, and imports what is slow when it is called."""

from typing import Annotated, Any

import typer

from medrl import cli_bench, cli_data, cli_eval, cli_import, cli_records, cli_scale, cli_study, cli_train, terminal
from medrl.provenance import medrl_version

COMMANDS = {
    "demo": cli_train.demo,
    "import": cli_import.imports,
    "split": cli_data.split,
    "audit": cli_data.audit,
    "plan": cli_scale.plan,
    "train": cli_train.train,
    "launch": cli_scale.launches,
    "eval": cli_eval.evaluate,
    "watch": cli_eval.watch,
    "rescore": cli_records.rescore,
    "compare": cli_records.compare,
    "report": cli_records.report,
    "study": cli_study.study,
    "export-data": cli_import.export_data,
    "export-records": cli_eval.export_records,
    "export-task": cli_eval.export_task,
    "bench": cli_bench.benches,
}
"""In the order of the work, which is the order of the help."""


class _InOrder(terminal.Commands):
    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)


app = typer.Typer(
    cls=_InOrder,
    name="medrl",
    help="Train and evaluate medical vision-language models with reinforcement learning. Research use only.",
    epilog="To see everything work, on a CPU, in minutes: medrl demo. Every command's --help has an example.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for name, work in COMMANDS.items():
    if isinstance(work, typer.Typer):
        app.add_typer(work, name=name)
    else:
        app.command(name)(work)


def main() -> None:
    """Entry point of ``medrl``."""
    app(prog_name="medrl")


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"medrl {medrl_version()}")
        raise typer.Exit


@app.callback()
def _medrl(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    pass
