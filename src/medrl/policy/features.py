"""Image features of a vision tower that does not change: computed once per image, for rollouts, reference and update,
or for answering and scoring."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


def together(pixels: Sequence[Tensor], device: torch.device) -> Tensor:
    """(patches of all, patch values) on the device; what lies in pinned memory is not waited for."""
    return torch.cat([part.to(device, non_blocking=True) for part in pixels])


class FrozenFeatures:
    """Caches image features until the pixel tensor is freed or the vision weights change."""

    def __init__(self) -> None:
        self._known: Any = WeakTensorKeyDictionary()  # by identity: equal pixels of two prompts are two entries
        self._weights: tuple[int, ...] = ()

    def of(self, family: Any, pixels: Sequence[Tensor], grids: Sequence[Tensor]) -> Tensor:
        """Features (image tokens, H) of all images, in order; those not known yet go through the tower together."""
        assert family.vision_frozen or not torch.is_grad_enabled(), "features of a tower that learns have a gradient"
        # A parameter counts its changes: a checkpoint that is loaded, or a tower that was trained in between, shows.
        weights = tuple(parameter._version for parameter in family.vision.parameters())
        if weights != self._weights:
            self._known.clear()
            self._weights = weights
        new = [n for n, images in enumerate(pixels) if images not in self._known]
        if new:
            unseen = together([pixels[n] for n in new], family.head.device)
            features = family.image_features(unseen, torch.cat([grids[n] for n in new]))
            counts = [family.image_tokens(grids[n]) for n in new]
            for n, part in zip(new, features.split(counts), strict=True):
                self._known[pixels[n]] = part.clone()  # a view would keep the whole batch
        return torch.cat([self._known[images] for images in pixels])
