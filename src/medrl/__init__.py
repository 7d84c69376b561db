"""medrl: reinforcement learning for medical vision-language models."""
