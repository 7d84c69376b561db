"""Copies to a GPU that Python does not wait for."""

import torch
from torch import Tensor


def bring(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on a device. By way of pinned memory, as torch waits for all that is queued before any other copy."""
    device = torch.device(device)
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
