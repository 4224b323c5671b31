"""Changes of a flat buffer since it was last sent: one bit an element, and the new values of those that differ.

A bf16 policy at a learning rate of 1e-6 changes a few percent of its weights in a step, since most updates are below
half a unit in the last place. The bitmap costs 1/16 of a bf16 buffer (1/32 of float32), whatever changed, and bits are
compared, not values: -0.0 replaces 0.0, and one NaN another. Applying a delta gives the sender's bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

_INTEGERS = {2: torch.int16, 4: torch.int32}
_BITS = tuple(1 << bit for bit in range(8))


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """View of the same memory as integers of the same width (2 or 4 bytes)."""
    return tensor.view(_INTEGERS[tensor.element_size()])


def bitmap_bytes(elements: int) -> int:
    """Length of the bitmap of a buffer of `elements` elements, in bytes."""
    return -(-elements // 8)


@dataclass(frozen=True)
class Delta:
    """The difference between two flat buffers of one length and dtype."""

    bitmap: torch.Tensor
    """Bitmap, [bitmap_bytes(elements)] uint8: bit i % 8 of byte i // 8 says whether element i differs."""
    values: torch.Tensor
    """New values in the order of the elements, [changed], in the buffer's dtype."""

    @property
    def changed(self) -> int:
        """Number of elements that differ."""
        return self.values.numel()

    @classmethod
    def between(cls, last: torch.Tensor, new: torch.Tensor) -> Delta:
        """The delta that turns `last` [elements] into `new` [elements], bit for bit."""
        differs = bits_of(last) != bits_of(new)
        padded = torch.zeros(8 * bitmap_bytes(new.numel()), dtype=torch.uint8, device=new.device)
        padded[: new.numel()] = differs
        weights = torch.tensor(_BITS, dtype=torch.uint8, device=new.device)
        return cls((padded.view(-1, 8) * weights).sum(1, dtype=torch.uint8), new[differs])

    def apply_to(self, last: torch.Tensor) -> None:
        """Overwrite the elements of `last` [elements] that differ."""
        weights = torch.tensor(_BITS, dtype=torch.uint8, device=last.device)
        differs = (self.bitmap.unsqueeze(1) & weights).flatten()[: last.numel()].bool()
        last[differs] = self.values
