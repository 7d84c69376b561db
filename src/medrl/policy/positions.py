"""Rotary positions of a Qwen2-VL prompt, from its tokens and grids alone: no model, no loop over tokens."""

import numpy as np
import torch
from torch import Tensor


def rotary_positions(token_ids: Tensor, grids: Tensor, image_token_id: int, merge_size: int) -> Tensor:
    """What transformers' ``get_rope_index`` gives for text and images.

    Text goes on by one on all three axes. The tokens of an image have the places of its grid, counted from where it
    begins; behind it, text goes on after its longer side.

    Args:
        token_ids: (P,) image placeholders expanded.
        grids: (images, 3) patches in time, height, width.
        merge_size: patches of a token along height, and along width.

    Returns:
        (3, P) positions on the axes time, height, width.
    """
    is_image = token_ids.numpy() == image_token_id
    if not is_image.any():
        return torch.arange(len(token_ids)).repeat(3, 1)
    sizes = grids.numpy() // (1, merge_size, merge_size)  # tokens
    places = is_image.nonzero()[0]
    steps = (~is_image).astype(np.int64)  # from a token to the next one; an image is left at its last
    steps[places[sizes.prod(1).cumsum() - 1]] = sizes[:, 1:].max(1)
    positions = np.tile(steps.cumsum() - steps, (3, 1))
    positions[:, places] += np.concatenate([np.indices(size).reshape(3, -1) for size in sizes], axis=1)
    return torch.from_numpy(positions)
