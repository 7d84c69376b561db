"""The policy room: the model, packed streams, and log-probabilities of completions."""
