"""Settings of supervised fine-tuning."""

from typing import Literal

from medrl.settings import Settings


class SFT(Settings):
    """Supervised fine-tuning on the right answers."""

    reduction: Literal["sequence", "token"] = "token"
    """``token``: every answer token counts the same; ``sequence``: every answer counts the same."""
