"""The machine a plan is for: every rate and every guess of the time estimate, with its unit and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

from megatron_entropic.config.run import Dtype


def _constant(value: float, unit: str, source: str) -> Any:
    """A dataclass field with its unit and source, which the report prints."""
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Hardware:
    """Rates of H100 SXM nodes and guesses of what is reached of them; `hardware_of` gives those of other GPUs."""

    gpus_per_node: int = _constant(8, "GPUs", "DGX and HGX H100")
    bfloat16_flop_per_s: float = _constant(989e12, "FLOP/s", "H100 SXM data sheet, dense")
    float32_flop_per_s: float = _constant(67e12, "FLOP/s", "H100 SXM data sheet, without TF32")
    memory_bytes_per_s: float = _constant(3.35e12, "B/s", "H100 SXM data sheet")
    node_link_bytes_per_s: float = _constant(450e9, "B/s", "NVLink 4, each direction, H100 SXM data sheet")
    network_bytes_per_s: float = _constant(50e9, "B/s", "one 400 Gbit/s InfiniBand port for each GPU")
    training_efficiency: float = _constant(
        0.45, "of FLOP/s", "guess; bfloat16 products of 8192 cubed reached 0.8 on an H200, layers have more than those"
    )
    prefill_efficiency: float = _constant(0.5, "of FLOP/s", "guess")
    decode_efficiency: float = _constant(0.6, "of memory B/s", "guess; plain copies reached 0.9 on an H200")
    link_efficiency: float = _constant(0.7, "of link B/s", "guess, for messages of 10 MB and more")
    decode_overhead_s: float = _constant(0.004, "s", "guess: scheduling and sampling of one vLLM step")
    all_reduce_latency_s: float = _constant(15e-6, "s", "guess: one small all-reduce within a node")
    exposed_gradient_share: float = _constant(0.5, "of the time", "guess: gradient traffic that backward does not hide")

    def flop_per_s(self, dtype: Dtype) -> float:
        """Peak rate of matrix products, in FLOP/s."""
        return self.bfloat16_flop_per_s if dtype == "bfloat16" else self.float32_flop_per_s

    def link_bytes_per_s(self, across_nodes: bool) -> float:
        """Bytes per second that a collective reaches between two GPUs."""
        peak = self.network_bytes_per_s if across_nodes else self.node_link_bytes_per_s
        return self.link_efficiency * peak

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yields (name, value with unit, source) of every constant."""
        for constant in fields(self):
            value = getattr(self, constant.name)
            yield constant.name, f"{value:g} {constant.metadata['unit']}", constant.metadata["source"]


_LARGE_MEMORY_GB = 100
_H200_MEMORY_BYTES_PER_S = 4.8e12


def hardware_of(gpu_memory_gb: float) -> Hardware:
    """Rates of an H100, or above 100 GB those with an H200's memory rate (4.8 TB/s, its data sheet)."""
    if gpu_memory_gb > _LARGE_MEMORY_GB:
        return replace(Hardware(), memory_bytes_per_s=_H200_MEMORY_BYTES_PER_S)
    return Hardware()
