"""Rotary positions without a model, against transformers' own with one."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medrl.policy.positions import rotary_positions


@pytest.fixture(scope="module")
def rope_index(make_model):
    """transformers' ``get_rope_index`` of one prompt, and the two numbers that it takes from the model's config."""
    model = make_model()
    image_token_id = model.config.image_token_id

    def positions(token_ids, grids):
        is_image = (token_ids == image_token_id).int()
        found, _ = model.model.get_rope_index(
            token_ids[None], mm_token_type_ids=is_image[None], image_grid_thw=grids if len(grids) else None
        )
        return found[:, 0]

    return positions, image_token_id, model.config.vision_config.spatial_merge_size


@st.composite
def prompts(draw):
    """Runs of text tokens, and (height, width) in tokens of the images between them; two images never touch."""
    images = draw(st.lists(st.tuples(st.integers(1, 7), st.integers(1, 7)), max_size=4))
    between = [draw(st.integers(1, 5)) for _ in images[1:]]
    at_the_ends = st.integers(0 if images else 1, 12)
    return [draw(at_the_ends), *between, draw(at_the_ends)], images


@given(prompt=prompts())
def test_positions_are_those_of_transformers(rope_index, prompt):
    expected, image_token_id, merge = rope_index
    (first, *texts), images = prompt
    tokens = [5] * first
    for (height, width), text in zip(images, texts, strict=False):  # without an image, one run is all
        tokens += [image_token_id] * (height * width) + [7] * text
    token_ids = torch.tensor(tokens)
    grids = torch.tensor([(1, merge * height, merge * width) for height, width in images]).reshape(-1, 3)
    found, known = rotary_positions(token_ids, grids, image_token_id, merge), expected(token_ids, grids)
    assert found.dtype == known.dtype and torch.equal(found, known)
