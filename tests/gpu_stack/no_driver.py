"""Stands for the CUDA driver: programs that ask for a GPU get the meta device, or the CPU, and believe it is an H100.

Everything above the driver stays what it is. A process that installs this keeps it to its end.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

H100 = SimpleNamespace(
    major=9,
    minor=0,
    total_memory=80 * 2**30,
    multi_processor_count=132,
    name="NVIDIA H100",
    uuid="none",
    L2_cache_size=0,
)
TYPE_NAMES = {
    torch.bfloat16: "torch.cuda.BFloat16Tensor",
    torch.float16: "torch.cuda.HalfTensor",
    torch.float32: "torch.cuda.FloatTensor",
}


class Stream:
    """A stream, and an event, whose every method is done at once."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.cuda_stream = 0

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: self


class CudaIs(TorchFunctionMode):
    """Where a device "cuda" is asked for, another one is taken.

    Args:
        device: that one.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.replacement = device

    def _device(self, wanted: Any) -> Any:
        if isinstance(wanted, torch.device):
            return self.replacement if wanted.type == "cuda" else wanted
        return self.replacement if isinstance(wanted, str) and wanted.startswith("cuda") else wanted

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = self._device(kwargs["device"])
        kwargs.pop("pin_memory", None)
        if "out_dtype" in kwargs and self.replacement.type == "cpu":
            # Products of bfloat16 into float32 have a kernel on CUDA only; the operands' bits are the same in float32.
            wide = kwargs.pop("out_dtype")
            args = tuple(argument.to(wide) for argument in args)
        if func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.cuda:
            return args[0].to(self.replacement)
        if func is torch.Tensor.to:
            args = tuple(self._device(argument) for argument in args)
        return func(*args, **kwargs)


def replace_driver(device: torch.device) -> CudaIs:
    """Replaces what torch asks the driver; the returned mode, which the caller enters, replaces devices.

    Args:
        device: meta or CPU.
    """
    cuda: Any = torch.cuda
    cuda.current_device = lambda: device
    cuda.is_available = lambda: True
    cuda.device_count = lambda: 1
    cuda.get_device_capability = lambda *_: (9, 0)
    cuda.get_device_name = lambda *_: H100.name
    cuda.get_device_properties = lambda *_: H100
    for name in ("set_device", "synchronize", "manual_seed", "empty_cache", "ipc_collect", "set_rng_state"):
        setattr(cuda, name, lambda *_, **__: None)
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.memory_allocated = cuda.max_memory_allocated = lambda *_: 0
    cuda.Stream = cuda.Event = Stream
    cuda.current_stream = cuda.default_stream = lambda *_: Stream()
    cuda.stream = lambda *_: contextlib.nullcontext()
    cuda.is_current_stream_capturing = lambda *_: False
    cuda.graphs.is_current_stream_capturing = cuda.is_current_stream_capturing
    cuda.nvtx.range_push = cuda.nvtx.range_pop = lambda *_, **__: None
    tensor: Any = torch.Tensor
    if device.type == "cpu":
        tensor.is_cuda = property(lambda self: True)
    own_type = tensor.type
    tensor.type = lambda self, *args, **options: (
        own_type(self, *args, **options) if args or options else TYPE_NAMES.get(self.dtype, own_type(self))
    )

    import megatron.core.tensor_parallel.random as generators

    generators._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    generators._set_cuda_rng_state = lambda *_, **__: None
    return CudaIs(device)
