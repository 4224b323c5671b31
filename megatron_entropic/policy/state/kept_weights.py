"""The weights of one earlier version, in host memory beside the policy's own.

    keep: parameters --> kept          in_place: parameters <--> kept, for the length of a block

They are those that engines sample from while the policy is updated: what those tokens' log-probs are can only be asked
when the last of them is there, and the policy is a version further by then.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from megatron_entropic.policy.megatron.platform import Platform


class KeptWeights:
    """A copy of a model's parameters, and the change of places."""

    def __init__(self, model: torch.nn.Module, platform: Platform) -> None:
        """Keep nothing yet; `model` has the chunks of this rank's stage."""
        self._model = model
        self._platform = platform
        self._kept: list[torch.Tensor] = []
        self._own: list[torch.Tensor] = []

    def keep(self) -> None:
        """Copy the parameters as they are now."""
        self._kept = self._copied_into(self._kept)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the kept weights be the parameters within the block; afterwards they are what they were, bit for bit.

        Where none were kept, the parameters stay.
        """
        if not self._kept:
            yield
            return
        self._own = self._copied_into(self._own)
        self._load(self._kept)
        try:
            yield
        finally:
            self._load(self._own)

    def _trained(self) -> list[torch.nn.Parameter]:
        """Parameters that change: all, or with adapters theirs."""
        return [parameter for parameter in self._model.parameters() if parameter.requires_grad]

    def _copied_into(self, host: list[torch.Tensor]) -> list[torch.Tensor]:
        parameters = [parameter.detach() for parameter in self._trained()]
        if not host:
            # Memory that stays: pinning it takes longer than copying.
            pinned = self._platform.device.type == "cuda"
            host = [torch.empty(p.shape, dtype=p.dtype, pin_memory=pinned) for p in parameters]
        for copy, parameter in zip(host, parameters, strict=True):
            copy.copy_(parameter, non_blocking=True)
        self._platform.synchronize()
        return host

    def _load(self, host: list[torch.Tensor]) -> None:
        with torch.no_grad():
            for parameter, copy in zip(self._trained(), host, strict=True):
                parameter.copy_(copy, non_blocking=True)
        self._platform.synchronize()
