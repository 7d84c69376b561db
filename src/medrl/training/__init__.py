"""Training: from a batch of groups to an update, a checkpoint, a run."""
