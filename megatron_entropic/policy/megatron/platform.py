"""The one place that knows the device: CPU with gloo, or CUDA with NCCL, chosen once at start.

A platform is taken before anything of megatron-core is used: it checks the installed version, silences known noise and,
on a CPU, patches what assumes CUDA.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import os
import resource
import socket
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from datetime import timedelta
from importlib import metadata
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_entropic.errors import PhaseTimeout, UserError
from megatron_entropic.observability.noise import drop_messages
from megatron_entropic.policy.megatron.cpu_patches import PACKED_ROTARY, apply_cpu_patches

Device = Literal["auto", "cpu", "cuda"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Address at which the ranks of a policy meet, and this rank's number among them."""

    port: int
    """Port of rank 0."""
    address: str = "127.0.0.1"
    rank: int = 0
    world_size: int = 1
    listener: socket.socket | None = None
    """Socket of rank 0, listening there already, so that no other program can take the port meanwhile.

    The process group owns it from then on. None: rank 0 opens the port itself.
    """

    @classmethod
    def alone(cls) -> Rendezvous:
        """The rendezvous of a policy of one rank, which listens on its port from now on."""
        listener = socket.create_server(("127.0.0.1", 0))
        return cls(int(listener.getsockname()[1]), listener=listener)

    @classmethod
    def from_environment(cls) -> Rendezvous:
        """The rendezvous that torchrun and `local_ranks` give: MASTER_PORT, MASTER_ADDR, RANK, WORLD_SIZE."""
        environment = os.environ
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        return cls(int(environment["MASTER_PORT"]), environment["MASTER_ADDR"], rank, world_size)


class Platform(ABC):
    """Device and communication of one policy rank."""

    backend: str
    """Name of the communication library in torch.distributed."""
    fused_kernels: bool
    """Whether megatron-core's fused element-wise kernels are used."""
    transformer_engine: bool
    """Whether layers are Transformer Engine's, else megatron-core's with our norms and attention."""
    fused_weight_gradients: bool
    """Whether products add weight gradients to float32 buffers themselves (apex's `fused_weight_gradient_mlp_cuda`)."""
    takes_prefixes: bool
    """Whether a segment of a packed micro-batch may go on from another's prefix: ours, for CPUs, sees both."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of this process's tensors."""

    @abstractmethod
    def peak_memory_mb(self) -> float:
        """Highest memory use of this process so far, in units of 2**20 bytes."""

    @abstractmethod
    def memory_mb(self) -> float:
        """Memory use of this process now, as `peak_memory_mb` counts it."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Hand memory that is free here back to the device, for other processes."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait for copies between device and host."""

    def init_process_group(
        self,
        rendezvous: Rendezvous,
        *,
        timeout_s: float,
    ) -> None:
        """Join the process group of all policy ranks; `timeout_s` also limits each of its collectives.

        Raises:
            PhaseTimeout: not all ranks joined in time.
        """
        timeout = timedelta(seconds=timeout_s)
        rank, world_size = rendezvous.rank, rendezvous.world_size
        try:
            store = dist.TCPStore(
                rendezvous.address,
                rendezvous.port,
                world_size,
                is_master=rank == 0,
                timeout=timeout,
                master_listen_fd=rendezvous.listener.detach() if rendezvous.listener else None,
            )
            dist.init_process_group(self.backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        except dist.DistError as error:
            raise PhaseTimeout(
                f"phase rendezvous: policy rank {rank} did not meet all {world_size} ranks at "
                f"{rendezvous.address}:{rendezvous.port} within {timeout_s:g} s: {error}"
            ) from error

    def manual_seed(self, seed: int) -> None:
        """Seed torch and megatron-core's per-rank generators; model parallelism must be initialised."""
        from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

        torch.manual_seed(seed)
        model_parallel_cuda_manual_seed(seed)


class CpuPlatform(Platform):
    """Platform of a CPU with gloo."""

    backend = "gloo"
    fused_kernels = False
    transformer_engine = False
    fused_weight_gradients = False
    takes_prefixes = True

    def __init__(self, megatron_version: tuple[int, int]) -> None:
        apply_cpu_patches(megatron_version)

    @property
    def device(self) -> torch.device:
        """The CPU."""
        return torch.device("cpu")

    def peak_memory_mb(self) -> float:
        """Peak resident set of the process (Linux counts it in units of 1024 bytes)."""
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    def memory_mb(self) -> float:
        """Resident set of the process."""
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize() / 2**20

    def empty_cache(self) -> None:
        """Do nothing: freed storages go back to the system by themselves."""

    def synchronize(self) -> None:
        """Do nothing: copies are complete when they return."""


class CudaPlatform(Platform):
    """Platform of CUDA with NCCL, one GPU a rank."""

    backend = "nccl"
    fused_kernels = True
    takes_prefixes = False

    def __init__(self) -> None:
        self.transformer_engine = transformer_engine_is_usable()
        if not self.transformer_engine:
            PACKED_ROTARY.apply()
        # apex's extension, where a site or an image has it, was never run beside the output heads, which add to the
        # same float32 buffers themselves; it would save less than a hundredth of an update.
        self.fused_weight_gradients = False
        # A launcher that gives each process its own GPU makes it device 0; torchrun numbers them.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())

    @property
    def device(self) -> torch.device:
        """This rank's GPU."""
        return torch.device("cuda", torch.cuda.current_device())

    def peak_memory_mb(self) -> float:
        """Peak of torch's allocator on this GPU, in units of 2**20 bytes."""
        return torch.cuda.max_memory_allocated() / 2**20

    def memory_mb(self) -> float:
        """Memory that torch's allocator has given out on this GPU, in units of 2**20 bytes."""
        return torch.cuda.memory_allocated() / 2**20

    def empty_cache(self) -> None:
        """Free the allocator's unused blocks, and those that an engine has looked at and let go of."""
        torch.cuda.ipc_collect()
        torch.cuda.empty_cache()

    def synchronize(self) -> None:
        """Wait for the current stream."""
        torch.cuda.current_stream().synchronize()


@functools.cache
def transformer_engine_is_usable() -> bool:
    """Whether policies are built of Transformer Engine's layers: it is installed, all of it, and imports.

    Logs the reason where it does not, since megatron-core's own layers are slower and know no fp8.

    Raises:
        UserError: what is installed is broken in a way that megatron-core cannot be imported beside.
    """
    if importlib.util.find_spec("transformer_engine") is None:
        log.info("Transformer Engine is not installed: the policy uses megatron-core's own layers")
        return False
    try:
        importlib.import_module("transformer_engine.pytorch")
    except ImportError as error:
        # megatron-core expects this one and does without Transformer Engine too.
        log.warning("Transformer Engine is installed but not usable, megatron-core's own layers are used: %s", error)
        return False
    except (OSError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"Transformer Engine is installed but broken ({type(error).__name__}: {error}), and megatron-core cannot "
            "be imported beside it. Build it again for this torch (bash tools/environment.sh gpu) or remove it "
            "(pip uninstall transformer-engine transformer-engine-cu13 transformer-engine-torch)"
        ) from error
    return True


@functools.cache
def select_platform(device: Device = "auto") -> Platform:
    """The platform of this process; asked again, the same object.

    Args:
        device: "auto" takes CUDA where torch finds a GPU.

    Raises:
        UserError: CUDA asked for where there is none, or megatron-core missing or of an unknown version.
    """
    version = check_megatron_version(installed_megatron_version())
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda was asked for, but torch finds no GPU (cluster.device=cpu runs without one)")
    silence_known_noise()
    # One hardware queue keeps megatron-core's communication ahead of the computation it overlaps with; it insists.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    # float32 is to mean float32, also in Transformer Engine's products (`cluster/actors.py`).
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        return CudaPlatform()
    return CpuPlatform(version)


# Which megatron-core versions the policy knows: 0.16 (Python 3.11) to 0.19 (Python 3.12).

OLDEST = (0, 16)
NEWEST = (0, 19)


def check_megatron_version(version: str) -> tuple[int, int]:
    """Major and minor number of a supported megatron-core version.

    The policy overrides private parts of megatron-core and, on a CPU, replaces literals in its functions; both were
    checked against these versions only, so another one is refused rather than tried.

    Raises:
        UserError: any other version.
    """
    parts = version.split(".")
    try:
        found = (int(parts[0]), int(parts[1]))
    except (ValueError, IndexError) as error:
        raise UserError(f"megatron-core {version!r}: not a version number") from error
    if not OLDEST <= found <= NEWEST:
        raise UserError(
            f"megatron-core {version} is not supported: megatron_entropic works with {OLDEST[0]}.{OLDEST[1]} to "
            f"{NEWEST[0]}.{NEWEST[1]}. Install megatron-core==0.16.1 (Python 3.11) or 0.19.2 (Python 3.12)."
        )
    return found


def installed_megatron_version() -> str:
    """Version of the installed megatron-core, read from its package metadata without importing it.

    Raises:
        UserError: it is not installed.
    """
    try:
        return metadata.version("megatron-core")
    except metadata.PackageNotFoundError as error:
        raise UserError("megatron-core is not installed: pip install megatron-core==0.16.1 (Python 3.11)") from error


# Messages of megatron-core and torch that tell the user of a policy nothing, silenced one by one.
#
# Everything not listed here is shown: a new warning is news.


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
"""Python warnings that are dropped."""

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
"""Log records that are dropped, by logger."""


def silence_known_noise() -> None:
    """Install the filters in this process; call before importing megatron.core, which warns while it is imported."""
    for noise in WARNINGS:
        warnings.filterwarnings("ignore", message=noise.message)
    drop_messages({name: noise.message for name, noise in LOGS.items()})
