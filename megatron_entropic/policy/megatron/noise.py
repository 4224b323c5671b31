"""Messages of megatron-core and torch that tell the user of a policy nothing, silenced one by one.

Everything not listed here is shown: a new warning is news.
"""

from __future__ import annotations

import logging
import re
import warnings
from dataclasses import dataclass


@dataclass(frozen=True)
class Noise:
    """One message and why it may be dropped."""

    message: str
    """Regular expression, matched at the start of the message."""
    reason: str


WARNINGS = (
    Noise(r"Transformer Engine and Apex are not installed", "known: the platform chose the layers without them"),
    Noise(r"Apex is not installed", "known, as above"),
    Noise(
        r"`torch\.distributed\.(all_gather_into_tensor|reduce_scatter_tensor)` is deprecated",
        "torch about calls that megatron-core makes; its old names still work",
    ),
    Noise(
        r"If you are using transformer_engine as the transformer implementation, the core_attn",
        "about fused attention, while core_attn is recomputed with unfused layers only",
    ),
    Noise(
        r"invalid escape sequence '\\-'", "a docstring of megatron-core 0.19, told where it is compiled at each start"
    ),
    Noise(r"full scope is deprecated", "megatron-core 0.19 about a default of its own (CUDA graphs, which are off)"),
)
"""Python warnings."""

LOGS = {
    "torch.utils.cpp_extension": Noise(
        r"No CUDA runtime is found, using CUDA_HOME",
        "a torch built for CUDA on a machine without: megatron-core 0.19 asks",
    ),
    "megatron.core.models.gpt.gpt_model": Noise(
        r"GPTModel IS DEPRECATED", "megatron-core 0.19 recommends HybridModel, which 0.16 lacks"
    ),
    "megatron.core.tensor_parallel.random": Noise(
        r"CPU RNG state changed within GPU RNG context", "on the CPU platform both are the same generator"
    ),
}
"""Log records, by logger."""


class _MessageFilter(logging.Filter):
    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.match(record.getMessage()) is None


def silence_known_noise() -> None:
    """Installs the filters in this process; call before importing megatron.core, which warns while it is imported."""
    for noise in WARNINGS:
        warnings.filterwarnings("ignore", message=noise.message)
    for name, noise in LOGS.items():
        logging.getLogger(name).addFilter(_MessageFilter(noise.message))
