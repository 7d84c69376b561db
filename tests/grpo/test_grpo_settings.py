import pytest

from medrl.errors import SettingsError
from medrl.grpo import GRPO, REDUCTIONS


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"group_size": 1},
            "group_size is 1, but a group needs at least 2 completions: the advantage of a lone completion is always 0",
        ),
        (
            {"kl_coef": -0.1},
            "kl_coef is -0.1, but it must be at least 0: a negative weight would push the policy away from the "
            "reference (0 trains without a reference)",
        ),
        ({"clip_low": 1.5}, "clip_low is 1.5, but it must be above 0 and at most 1: a ratio is never negative"),
        ({"clip_high": 0}, "clip_high is 0, but it must be above 0: otherwise no completion is ever reinforced"),
        ({"updates_per_rollout": 0}, "updates_per_rollout is 0, but it must be at least 1"),
        ({"reduction": "batch"}, "reduction is the text 'batch', but it must be 'sequence', 'token' or 'constant'"),
    ],
)
def test_a_setting_that_cannot_work_says_why(values, message):
    with pytest.raises(SettingsError) as caught:
        GRPO(**values)
    assert str(caught.value) == message


def test_the_defaults_are_those_the_papers_ran_with():
    grpo = GRPO()
    assert (grpo.kl_coef, grpo.clip_low, grpo.clip_high, grpo.updates_per_rollout) == (0.04, 0.2, 0.2, 1)


def test_every_reduction_a_recipe_may_name_exists():
    for name in REDUCTIONS:
        assert GRPO(reduction=name).reduction == name  # pyright: ignore[reportArgumentType]
