"""``python -m medrl``: the same as ``medrl``."""

from medrl.cli import main

main()
