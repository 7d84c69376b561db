"""The rollout room: prompts -> completions -> scored groups."""
