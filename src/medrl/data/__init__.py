"""Data: sources become stores, stores become examples, examples become prompts."""
