import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medrl.policy.layout import pack, visible


def text_positions(length: int) -> torch.Tensor:
    return torch.arange(length).expand(3, -1)


def test_a_tiny_stream_is_laid_out_as_by_hand():
    # A prompt of 2 with completions of 3 and 1 tokens, then a prompt of 1 with one of 2:
    # p p a b | q c   ("a b" are the first two of three; the completion of one token and each last one are not fed).
    layout = pack([text_positions(2), text_positions(1)], [[3, 1], [2]])
    assert layout.group.tolist() == [0, 0, 0, 0, 1, 1]
    assert layout.branch.tolist() == [0, 0, 1, 1, 0, 1]
    assert layout.positions.tolist() == [[0, 1, 2, 3, 0, 1]] * 3
    assert layout.prompt_index.tolist() == [0, 1, 4]
    assert layout.completion_index.tolist() == [2, 3, 5]
    # Each completion's first token is predicted by the last prompt token, the others by the token before.
    assert layout.predictor.tolist() == [1, 2, 3, 1, 4, 5]
    assert layout.row.tolist() == [0, 0, 0, 1, 2, 2]
    assert layout.column.tolist() == [0, 1, 2, 0, 0, 1]
    assert (layout.group_lengths, layout.completion_lengths) == ((4, 2), (3, 1, 2))


def test_visibility_of_a_tiny_stream_is_as_by_hand():
    # p a a b | q c: two completions with 2 and 1 tokens in the stream, then another group.
    layout = pack([text_positions(1), text_positions(1)], [[3, 2], [2]])
    assert visible(layout).int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0],  # b sees the prompt and itself, not a
        [0, 0, 0, 0, 1, 0],  # nor does another group
        [0, 0, 0, 0, 1, 1],
    ]


def test_completions_continue_after_the_largest_prompt_position_on_every_axis():
    # An image of 1 x 2 x 2 tokens between two words: text goes on after the largest of the three axes.
    prompt = torch.tensor([[0, 1, 1, 1, 1, 3], [0, 1, 1, 2, 2, 3], [0, 1, 2, 1, 2, 3]])
    layout = pack([prompt], [[4, 3]])
    assert layout.positions[:, 6:].tolist() == [[4, 5, 6, 4, 5]] * 3


def test_spread_and_mask_put_each_value_in_its_row():
    layout = pack([text_positions(2), text_positions(1)], [[3, 1], [2]])
    assert layout.spread(torch.arange(1.0, 7.0)).tolist() == [[1, 2, 3], [4, 0, 0], [5, 6, 0]]
    assert layout.completion_mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]


def test_spread_keeps_the_gradient_of_every_value():
    layout = pack([text_positions(2)], [[2, 1]])
    values = torch.ones(3, dtype=torch.float64, requires_grad=True)
    (layout.spread(values) * torch.tensor([[2.0, 3.0], [5.0, 7.0]])).sum().backward()
    assert values.grad is not None and values.grad.tolist() == [2, 3, 5]


groups = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)), min_size=1, max_size=4
)


@settings(deadline=None)
@given(groups)
def test_each_completion_sees_exactly_what_it_would_see_alone(drawn):
    layout = pack([text_positions(p) for p, _ in drawn], [lengths for _, lengths in drawn])
    sees = visible(layout)
    start = row = 0
    for prompt, lengths in drawn:
        at = start + prompt
        for length in lengths:
            own = [*range(start, start + prompt), *range(at, at + length - 1)]
            for place, token in enumerate(own[prompt:], start=prompt):
                assert sees[token].nonzero().flatten().tolist() == own[: place + 1]
                assert layout.positions[0, token] == place
            assert layout.predictor[layout.row == row].tolist() == own[prompt - 1 :]
            at, row = at + length - 1, row + 1
        start = at
    assert start == len(layout.group)
