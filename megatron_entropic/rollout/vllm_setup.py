"""The environment variables that vLLM reads, set in one place before it is imported.

Two more must be there before the process starts, because the OpenMP runtime reads them when it is loaded:
OMP_WAIT_POLICY=PASSIVE wherever engines share cores with other processes (threads that spin while they wait made
generation ten times slower), and OMP_NUM_THREADS. Whoever starts the process sets those (`cluster/`).
"""

from __future__ import annotations

import os
from typing import Literal

Device = Literal["cpu", "cuda"]

_ALWAYS = {
    # The engine's scheduler lives in this process: requests are then scheduled the same way every time, and a failure
    # is an exception here instead of a dead child. Workers of tensor parallelism are processes of their own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
_UNLESS_SET = {
    "VLLM_LOGGING_LEVEL": "WARNING",
    # An engine lives on one machine; its own rendezvous needs no other interface.
    "VLLM_HOST_IP": "127.0.0.1",
}
_CPU_UNLESS_SET = {
    # Eager or not, vLLM compiles a log-prob helper with inductor, for which a bare machine has no C++ compiler.
    "TORCHDYNAMO_DISABLE": "1",
    # Binding engines to the same first cores makes them fight for these.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


def prepare_environment(device: Device) -> None:
    """Set vLLM's variables in this process; its children inherit them."""
    os.environ.update(_ALWAYS)
    defaults = _UNLESS_SET | (_CPU_UNLESS_SET if device == "cpu" else {})
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # It would override rollout.kv_cache_gb without a word.
    os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
