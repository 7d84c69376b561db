import math

import pytest

from medrl.data.prompts import make_prompt
from medrl.errors import NonFiniteError
from medrl.rollout.collect import collect
from medrl.rollout.sampling import Sampling
from medrl.types import Score

SAMPLING = Sampling(max_new_tokens=6)


def test_every_completion_is_scored_with_its_own_example(policy, make_examples, tmp_path):
    examples = make_examples(tmp_path, 3)
    asked = []

    def reward(example, completion):
        asked.append((example.id, completion.token_ids))
        return Score(value=float(len(asked)), parts={"order": float(len(asked))})

    groups = collect(policy, examples, make_prompt, reward, SAMPLING, group_size=2, seed=0, step=0)
    assert [group.example for group in groups] == examples
    assert [group.prompt for group in groups] == [make_prompt(example) for example in examples]
    assert groups.rewards == [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]
    written = [(g.example.id, r.completion.token_ids) for g in groups for r in g.rollouts]
    assert asked == written
    again = collect(policy, examples, make_prompt, reward, SAMPLING, group_size=2, seed=0, step=0)
    assert [r.completion for r in again.rollouts] == [r.completion for r in groups.rollouts]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_reward_that_is_not_finite_is_named_with_its_example(policy, make_examples, tmp_path, value):
    def reward(example, completion):
        broken = example.id == "example-1"
        return Score(value=value if broken else 1.0, parts={"odd": value if broken else 1.0})

    with pytest.raises(NonFiniteError, match=r"example-1 .*odd"):
        collect(policy, make_examples(tmp_path, 3), make_prompt, reward, SAMPLING, group_size=2, seed=0, step=0)
