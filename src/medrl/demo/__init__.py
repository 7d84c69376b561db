"""The embedded end-to-end run: real images, a tiny base model, GRPO against supervised training, one report."""
