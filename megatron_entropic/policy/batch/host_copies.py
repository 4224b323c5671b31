"""Copies between host and device for which the host does not wait.

A copy from pageable memory to a GPU ends after everything that the GPU was asked for before, and the host waits for it:
it cannot prepare the next micro-batch meanwhile. From pinned memory the copy is one more thing in the GPU's queue.
"""

from __future__ import annotations

import torch


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor to `device`; the device sees the copy before anything that it is asked for later."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def parked_on_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to host memory, for `to_device` later on. The host itself must not read it before it has waited."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu")
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
