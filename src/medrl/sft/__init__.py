"""Supervised fine-tuning: cross-entropy on the answer tokens only."""

from medrl.sft.loss import cross_entropy
from medrl.sft.settings import SFT

__all__ = ["SFT", "cross_entropy"]
