"""Implementations of the element-wise work on a block of logits: their interface, and the choice between them.

eager    chunked PyTorch; any device and dtype
triton   one kernel forward, one backward; GPU (or, for tests, Triton's interpreter)
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, Protocol

import torch
from torch import Tensor

from megatron_entropic.tensor_parallel.eager import EagerBackend
from megatron_entropic.tensor_parallel.statistics import GradientInputs

BackendName = Literal["auto", "eager", "triton"]


class Backend(Protocol):
    """The two passes over a block of raw logits x [T, n], of which the first `valid` columns exist."""

    def statistics(
        self, x: Tensor, column: Tensor, inverse_temperature: Tensor, *, valid: int, pieces: int, out: Tensor
    ) -> None:
        """Summarise the block in one read; x stays as it is.

        Args:
            x: [T, n] of a floating dtype, unit stride along the columns.
            column: [T] int64 the target's column, or -1 if it is not in this block.
            inverse_temperature: [T] in the dtype of `out`.
            valid: columns that exist; those beyond are neither read as numbers nor counted.
            pieces: P, how many equal parts of the n columns are summarised each for itself.
            out: [P * k + 1, T], see `statistics.empty_statistics`; k = 3 asks for W, k = 2 not. Rows need unit stride
                only along T.
        """

    def gradient(self, x: Tensor, inputs: GradientInputs, *, valid: int, out: Tensor) -> None:
        """Compute dL/dx in one read and one write; zero in columns that do not exist.

        With d = (x - M) / temperature, p = exp(d) / S and log p + H = d + (H - log S), a row is

            k exp(d) (g + h (H - log S) + h d)   with k = -1 / (temperature S),   plus g / temperature in its target

        The last is added before rounding to the dtype of `out`: for a confident token the two nearly cancel.

        Args:
            x: [T, n] the logits that `statistics` has seen.
            inputs: what else a token's gradient depends on: M, S, H, g, h.
            valid: as in `statistics`.
            out: [T, n], may be x itself, and may be of another dtype. Its autograd version counter is raised.
        """


def select_backend(name: BackendName, device: torch.device) -> Backend:
    """Choose the implementation called `name`; "auto" takes triton on a GPU where it is installed, else eager.

    Raises:
        ValueError: no such implementation, or it cannot run on this device.
    """
    if name == "eager" or (name == "auto" and not (device.type == "cuda" and _triton_runs_on(device))):
        return EagerBackend()
    if name not in ("auto", "triton"):
        raise ValueError(f"backend must be auto, eager or triton, not {name!r}")
    if not _triton_runs_on(device):
        raise ValueError(
            f"backend='triton' cannot run on {device}: it needs a GPU and the package triton, "
            "or TRITON_INTERPRET=1 in the environment before triton is imported"
        )
    from megatron_entropic.tensor_parallel.triton_backend import TritonBackend

    return TritonBackend()


def _triton_runs_on(device: torch.device) -> bool:
    if importlib.util.find_spec("triton") is None:
        return False
    return device.type == "cuda" or (device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1")
