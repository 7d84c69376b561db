"""Random steps for every algorithm."""

from collections.abc import Callable

import numpy as np
import pytest

Step = dict[str, np.ndarray]


@pytest.fixture(scope="session")
def random_steps() -> Callable[..., Step]:
    """Log-probabilities around -2, ratios on both sides of any clip, completions of many lengths."""

    def make(seed: int, shortest: int = 0) -> Step:
        random = np.random.default_rng(seed)
        groups, size, tokens = random.integers(1, 4), random.integers(2, 5), random.integers(1, 9)
        rows = groups * size
        lengths = random.integers(shortest, tokens + 1, rows)
        logprobs = -random.exponential(2.0, (rows, tokens))
        drift = random.choice([0.0, 1e-4, 0.05, 0.4])
        rewards = random.choice([0.0, 0.2, 1.0, 1.2, 2.0], (groups, size))
        if random.random() < 0.3:
            rewards[0] = 1.2
        return {
            "rewards": rewards,
            "logprobs": logprobs,
            "old_logprobs": logprobs + random.normal(0, drift, logprobs.shape),
            "ref_logprobs": logprobs + random.normal(0, 0.5, logprobs.shape),
            "completion_mask": (np.arange(tokens) < lengths[:, None]).astype(float),
            "entropy": random.exponential(1.0, logprobs.shape),
        }

    return make
