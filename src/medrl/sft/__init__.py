"""Supervised fine-tuning: cross-entropy on the answer tokens only."""

from medrl.sft.loss import cross_entropy
from medrl.sft.settings import RFT, SFT

__all__ = ["RFT", "SFT", "cross_entropy"]
