"""The environment variables that vLLM reads, set in one place before it is imported, and its import.

Two more must be there before the process starts, because the OpenMP runtime reads them when it is loaded:
OMP_WAIT_POLICY=PASSIVE wherever engines share cores with other processes (threads that spin while they wait made
generation ten times slower), and OMP_NUM_THREADS. Whoever starts the process sets those (`cluster/`).
"""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

from megatron_entropic.observability.noise import drop_messages

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


# vLLM's log messages that say nothing about this program. By message, so that a new warning is seen.

# logger -> what its messages begin with
_KNOWN_NOISE = {
    # Rotary tables are computed, not loaded, and keep their values over an update. A tied output head gets its values
    # with the embedding (`gloo_transport`); that every tensor of the model arrives is checked before an update.
    "vllm.model_executor.model_loader.reload.layerwise": r"(\w*RotaryEmbedding|ParallelLMHead): Failed to load weights",
    # The engine is meant to run in this process, which draws nothing from global generators.
    "vllm.engine.arg_utils": r"The global random seed is set to",
    # Consequences of enforce_eager and of a CPU without Triton, both known.
    "vllm.config.vllm": r"Enforce eager set|Inductor compilation was disabled|Model Runner V2 requires Triton",
    # Thread binding is off, so there is nothing to do; preloading allocators would be faster, results are the same.
    "vllm.v1.worker.cpu_worker": r"CPU backend doesn't allow to use|.* is not found in LD_PRELOAD",
    "vllm.platforms.cpu": r"Triton is not installed",
    # Prompts and stop tokens are ids; there is no tokenizer on purpose.
    "vllm.renderers.base": r"Chat template warmup failed|Using None for EOS token id",
}


def silence_known_noise() -> None:
    """Install the filters of known messages in this process, best before vLLM is imported; repeatable."""
    # vLLM's Triton wrapper looks at every attribute of every module that it finds.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.reduce_op` is deprecated")
    drop_messages(_KNOWN_NOISE)


# vLLM processes of one engine that sleep while they wait for each other, where they share cores with other processes.
#
# With tensor parallelism the engine and its workers talk through shared memory, and a reader looks at it in a loop for
# a second after the last message before it sleeps. On a CPU these loops take the cores from the workers that load new
# weights, and from the policy's ranks for a second after every rollout.

_BUSY_LOOP_S = 0.0002
"""Seconds of the loop: longer than a message takes between two processes that both have a core."""
_PART_OF_WAIT, _LONGEST_MS = 0.1, 100
"""Share of the time waited so far after which a reader looks again, and its limit in ms: a notification can be lost."""


def let_readers_sleep() -> None:
    """Shorten the loop of vLLM's readers in this process, if its device is the CPU. Repeatable."""
    from vllm.distributed.device_communicators import shm_broadcast
    from vllm.platforms import current_platform

    if not current_platform.is_cpu() or shm_broadcast.SpinCondition.__module__ == __name__:
        return

    class SleepingCondition(shm_broadcast.SpinCondition):
        """vLLM's condition, but that it sleeps sooner and wakes by itself."""

        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named, busy_loop_s=_BUSY_LOOP_S)

        def wait(self, timeout_ms: int | None = None) -> None:
            """Sleep until a notification, `timeout_ms` or a part of the time since the last message is over."""
            waited_ms = 1000 * (time.monotonic() - self.last_read)
            recheck_ms = max(1, min(int(_PART_OF_WAIT * waited_ms), _LONGEST_MS))
            super().wait(recheck_ms if timeout_ms is None else min(timeout_ms, recheck_ms))

    shm_broadcast.SpinCondition = SleepingCondition


@contextmanager
def imported_for_good() -> Iterator[None]:
    """Keep Python from looking for garbage among modules while they are imported, and from then on: they stay.

    vLLM brings 5,000 modules with a million objects: on a CPU its import and an engine's start take 6 s of CPU time
    instead of 8 to 11.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()
