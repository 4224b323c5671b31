"""The machine a plan is for: every rate and every guess of the time estimate, with its unit and where it comes from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from megatron_entropic.config.run import Dtype
from megatron_entropic.errors import UserError


def _constant(value: float | str, unit: str, source: str) -> Any:
    """A dataclass field with its unit and source, which the report prints."""
    return field(default=value, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class Gpu:
    """Peak rates of one kind of GPU in its usual node of eight, from its data sheet; products without sparsity."""

    memory_gb: float
    """Memory in units of 2**30 bytes, as plans are usually asked for."""
    bfloat16_flop_per_s: float
    float8_flop_per_s: float
    """Rate of 8-bit products; that of bfloat16 where the GPU has none."""
    float32_flop_per_s: float
    memory_bytes_per_s: float
    node_link_bytes_per_s: float
    """Rate of NVLink in each direction."""
    network_bytes_per_s: float
    """Rate of the network port of each GPU."""
    source: str


GPUS = {
    "A100": Gpu(80, 312e12, 312e12, 19.5e12, 2.04e12, 300e9, 25e9, "A100 80GB SXM data sheet; HDR InfiniBand"),
    "H100": Gpu(80, 989e12, 1979e12, 67e12, 3.35e12, 450e9, 50e9, "H100 SXM data sheet; NDR InfiniBand"),
    "H200": Gpu(141, 989e12, 1979e12, 67e12, 4.8e12, 450e9, 50e9, "H200 SXM data sheet; NDR InfiniBand"),
    "H20": Gpu(96, 148e12, 296e12, 44e12, 4.0e12, 450e9, 50e9, "H20 data sheet; NDR InfiniBand"),
    "B200": Gpu(180, 2250e12, 4500e12, 80e12, 8.0e12, 900e9, 50e9, "DGX B200 data sheet; NDR InfiniBand"),
}


@dataclass(frozen=True)
class Hardware:
    """Rates of H100 SXM nodes and guesses of what is reached of them; `machine` gives those of other GPUs.

    Efficiencies were measured or read off publications on H100s, and are taken to be the same on other GPUs.
    """

    data_sheet: str = _constant(GPUS["H100"].source, "", "where the rates of the GPU are from")
    gpus_per_node: int = _constant(8, "GPUs", "DGX and HGX")
    bfloat16_flop_per_s: float = _constant(989e12, "FLOP/s", "data sheet, dense")
    float8_flop_per_s: float = _constant(1979e12, "FLOP/s", "data sheet, dense")
    float32_flop_per_s: float = _constant(67e12, "FLOP/s", "data sheet, without TF32")
    memory_bytes_per_s: float = _constant(3.35e12, "B/s", "data sheet")
    node_link_bytes_per_s: float = _constant(450e9, "B/s", "NVLink, each direction, data sheet")
    network_bytes_per_s: float = _constant(50e9, "B/s", "one InfiniBand port for each GPU")
    product_efficiency: float = _constant(
        0.7, "of FLOP/s", "DeepGEMM's README: 8-bit products of 4096 x 7168 x 16384 on an H800 reach 0.69"
    )
    attention_efficiency: float = _constant(
        0.45, "of FLOP/s", "FlashAttention-3 (arXiv 2407.08608), causal, head 128: 0.4 to 0.6, forward and backward"
    )
    memory_efficiency: float = _constant(
        0.6, "of memory B/s", "DeepGEMM's README: products with short sums are held up by writing results at 0.59"
    )
    link_efficiency: float = _constant(0.7, "of link B/s", "guess, for messages of 10 MB and more")
    exposed_gradient_share: float = _constant(0.5, "of the time", "guess: gradient traffic that backward does not hide")
    sends_once_per_node: bool = _constant(
        False, "", "megatron-core's all-to-all sends a copy of a token for each of its experts; DeepEP, HybridEP do not"
    )
    hidden_tensor_share: float = _constant(0.0, "of the time", "all-gathers that products hide: none, as policies run")
    hidden_expert_share: float = _constant(0.0, "of the time", "all-to-all that products hide: none, as policies run")
    layer_host_s: float = _constant(0.0015, "s", "guess: Python of a dense layer, forward and backward")
    expert_layer_host_s: float = _constant(
        0.011,
        "s",
        "Python of a layer with experts, forward and backward: Megatron-Bridge's Moonlight at one micro-batch",
    )
    prefill_efficiency: float = _constant(0.35, "of FLOP/s", "vLLM 0.11 on H100s, prompts of 4,000 tokens (gpustack)")
    decode_efficiency: float = _constant(0.8, "of memory B/s", "vLLM 0.9.2, Qwen3-8B, 4 at a time: 7.4 ms (gpustack)")
    decode_overhead_s: float = _constant(0.0015, "s", "the same measurement: what reading the weights does not explain")
    decode_sequence_s: float = _constant(
        40e-6, "s", "vLLM 0.11, Qwen3-14B, 760 at a time: 60 ms between tokens, 26 of them reading (gpustack)"
    )
    expert_decode_s: float = _constant(
        60e-6, "s", "guess: what a layer with experts adds to a decoding step: routing, sorting, two small products"
    )
    eager_layer_s: float = _constant(0.0003, "s", "guess: launches of a layer without CUDA graphs, 30 of 10 us")
    all_reduce_latency_s: float = _constant(15e-6, "s", "guess: one small all-reduce within a node")
    publish_efficiency: float = _constant(
        0.25, "of network B/s", "verl's broadcast end to end: 5 GB/s from FSDP, 12 GB/s from Megatron, of 50"
    )
    publish_tensor_s: float = _constant(
        0.0006, "s", "verl, Qwen3-30B-A3B from Megatron: 18,900 tensors; NeMo-RL, DeepSeek-V3: 0.8 ms"
    )
    publish_bucket_s: float = _constant(0.01, "s", "guess: two remote calls and their synchronisation")
    publish_s: float = _constant(2.0, "s", "guess: stopping engines, clearing their caches, starting them again")
    host_link_bytes_per_s: float = _constant(25e9, "B/s", "PCIe 5 x16 at 0.4, pinned memory: guess")
    storage_bytes_per_s: float = _constant(2e9, "B/s", "guess: what a node writes to a shared file system")
    failure_gpu_hours: float = _constant(
        50_700, "GPU-hours", "Llama 3 (arXiv 2407.21783): 419 unexpected interruptions in 54 days of 16,384 GPUs"
    )
    switch_s: float = _constant(
        10.0, "s", "guess: engines sleep and wake, allocators give memory back and take it again, twice a step"
    )

    def flop_per_s(self, dtype: Dtype, *, float8: bool = False) -> float:
        """Peak rate of matrix products, in FLOP/s."""
        if dtype == "float32":
            return self.float32_flop_per_s
        return self.float8_flop_per_s if float8 else self.bfloat16_flop_per_s

    def link_bytes_per_s(self, across_nodes: bool, members_per_node: int = 1) -> float:
        """Bytes per second that a collective reaches between two GPUs.

        Across nodes a ring of several members on each node has the ports of all of them, up to the links within.
        """
        peak = self.node_link_bytes_per_s
        if across_nodes:
            peak = min(peak, members_per_node * self.network_bytes_per_s)
        return self.link_efficiency * peak

    def rows(self) -> Iterator[tuple[str, str, str]]:
        """Yields (name, value with unit, source) of every constant."""
        for constant in fields(self):
            value, unit = getattr(self, constant.name), constant.metadata["unit"]
            shown = f"{value:g} {unit}" if unit else str(value)
            yield constant.name, shown, constant.metadata["source"]


@dataclass(frozen=True)
class Machine:
    """The GPUs that a configuration is planned for; `machine` makes one."""

    hardware: Hardware
    gpu_memory_gb: float
    """Memory of each GPU, in units of 2**30 bytes."""
    gpus: int | None = None
    """Number of GPUs of policy and engines together; None: as many as the configuration asks for."""


_LARGE_MEMORY_GB = 100


def machine(gpu: str | None = None, gpu_memory_gb: float | None = None, gpus: int | None = None) -> Machine:
    """A number of GPUs of one kind.

    Args:
        gpu: a key of `GPUS`; None: H100, or with a memory of more than 100 GB H200.
        gpu_memory_gb: memory of each, in units of 2**30 bytes; None: what the kind has.
        gpus: how many there are; None: as many as the configuration asks for.

    Raises:
        UserError: no such kind.
    """
    if gpu is None:
        gpu = "H200" if (gpu_memory_gb or 0) > _LARGE_MEMORY_GB else "H100"
    if gpu not in GPUS:
        raise UserError(f"GPU {gpu!r} is not known; known are {', '.join(GPUS)}")
    rates = GPUS[gpu]
    hardware = Hardware(
        bfloat16_flop_per_s=rates.bfloat16_flop_per_s,
        float8_flop_per_s=rates.float8_flop_per_s,
        float32_flop_per_s=rates.float32_flop_per_s,
        memory_bytes_per_s=rates.memory_bytes_per_s,
        node_link_bytes_per_s=rates.node_link_bytes_per_s,
        network_bytes_per_s=rates.network_bytes_per_s,
        data_sheet=rates.source,
    )
    return Machine(hardware, rates.memory_gb if gpu_memory_gb is None else gpu_memory_gb, gpus)
