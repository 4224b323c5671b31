"""Patches by which megatron-core's DistributedOptimizer resumes with torch's AdamW (no Transformer Engine, no Apex).

Seen in 0.16.1; 0.19.2 has the same lines. torch's AdamW keeps its step count as one tensor per parameter, Transformer
Engine's as a number per group, and the distributed optimizer's checkpoint code was written for the latter:

1. Loading copies every state tensor of a parameter from the checkpoint, but `step` travels in the parameter groups.
   With `fully_reshardable` it is not among the tensors: KeyError 'step'. With `dp_reshardable` it is what it was when
   loading began: the first steps after a resume are corrected as if they were the first of all.
2. `load_state_dict` gives all parameters the SAME step tensor. AdamW adds 1 to it once per parameter, so with 35
   parameters two steps after a resume at step 2 the count is 72, not 4, and the bias correction is gone. Parameters and
   moments restore exactly: only training on shows it.

Where an optimizer state has no such tensor (Transformer Engine's FusedAdam) both patches do nothing.
"""

from __future__ import annotations

import functools
import queue
import warnings
from collections.abc import Mapping
from typing import Any

import torch


def apply_optimizer_patches() -> None:
    """Install both optimizer patches; safe to call more than once. The originals stay reachable as `__wrapped__`."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    _wrap(DistributedOptimizer, "_set_main_param_and_optimizer_states", _keep_own_step)
    _wrap(DistributedOptimizer, "load_state_dict", _give_each_parameter_its_own_step)


def _wrap(owner: type, name: str, replacement: Any) -> None:
    original = getattr(owner, name)
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def patched(self: Any, *arguments: Any) -> Any:
        return replacement(original, self, *arguments)

    setattr(owner, name, patched)


def _keep_own_step(original: Any, self: Any, model_param: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Patch 1: keep the step that `load_state_dict` has already restored."""
    current = self._get_main_param_and_optimizer_states(model_param)
    if "step" in current:
        tensors = {**tensors, "step": current["step"]}
    return original(self, model_param, tensors)


def _give_each_parameter_its_own_step(original: Any, self: Any, state_dict: dict[str, Any]) -> None:
    """Patch 2: give each parameter a step tensor of its own."""
    original(self, state_dict)
    for state in self.optimizer.state.values():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].clone()


# How megatron-core's checkpoint writer is kept from starting processes of its own. Seen in 0.16.1.
#
# 1. Results of the writers travel through a queue of a `multiprocessing.Manager`, a spawned server process that lives
#    as
#    long as the rank. It imports the rank's main module (unguarded scripts recurse) and, when the rank is killed, stays
#    behind. A rank writes in a thread of its own process, so an ordinary queue serves.
# 2. Each file is written by a forked child. A rank holds gloo, Ray and CUDA threads, and a fork copies their locks in
#    whatever state they are. The rank writes its files itself. 0.19.2 writes in threads, but raises a thread's failure
#    on that rank only, while the others wait.
# 3. torch warns at every save and load about calls that megatron-core makes; the user of a run cannot change them.

WARNINGS = (
    r"`load_state_dict` is deprecated and will be removed in future versions",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    # 0.19
    r"The argument order of load has been changed",
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
)


def apply_checkpoint_patches() -> None:
    """Install all patches of the checkpoint writer; safe to call more than once."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    for message in WARNINGS:
        warnings.filterwarnings("ignore", message=message)

    if filesystem_async._results_queue is None:
        filesystem_async._results_queue = queue.Queue()
    writer = filesystem_async.FileSystemWriterAsync
    for name in ("write_preloaded_data_multiproc", "write_preloaded_data_multithread"):
        if hasattr(writer, name):
            setattr(writer, name, staticmethod(_write_in_this_process))


def _write_in_this_process(
    transforms: list[Any], use_msc: bool, rank: int, write_buckets: list[Any], results: queue.Queue[Any]
) -> None:
    """Stand-in for `write_preloaded_data_multiproc` (or multithread): same arguments and entry in `results`, no fork.

    `results` receives {bucket: results of the writes} or, when a file could not be written, the exception.
    """
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    outcome: dict[int, Any] | Exception = {}
    for index, bucket in enumerate(write_buckets):
        answers: queue.Queue[Any] = queue.Queue()
        pending: queue.Queue[Any] = queue.Queue()
        pending.put(index)
        FileSystemWriterAsync.write_preloaded_data(
            transforms,
            local_proc_idx=index,
            write_bucket=bucket,
            results_queue=answers,
            count_queue=pending,
            use_fsync=True,
            use_msc=use_msc,
        )
        written = answers.get_nowait()[1]
        if isinstance(written, Exception):
            outcome = written
            break
        assert isinstance(outcome, dict)
        outcome[index] = written
    results.put(outcome)
