"""Supervised fine-tuning: cross-entropy on the answer tokens only."""

from medrl.sft.loss import cross_entropy

__all__ = ["cross_entropy"]
