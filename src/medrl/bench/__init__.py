"""The bench: what a step and an evaluation cost here, against the physical limit and against other code."""
