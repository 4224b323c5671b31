"""How megatron-core's checkpoint writer is kept from starting processes of its own. Seen in 0.16.1.

1. Results of the writers travel through a queue of a `multiprocessing.Manager`, a spawned server process that lives as
   long as the rank. It imports the rank's main module (unguarded scripts recurse) and, when the rank is killed, stays
   behind. A rank writes in a thread of its own process, so an ordinary queue serves.
2. Each file is written by a forked child. A rank holds gloo, Ray and CUDA threads, and a fork copies their locks in
   whatever state they are. The rank writes its files itself. 0.19.2 writes in threads, but raises a thread's failure
   on that rank only, while the others wait.
3. torch warns at every save and load about calls that megatron-core makes; the user of a run cannot change them.
"""

from __future__ import annotations

import queue
import warnings
from typing import Any

WARNINGS = (
    r"`load_state_dict` is deprecated and will be removed in future versions",
    r"Please use DTensor instead and we are deprecating ShardedTensor",
    # 0.19
    r"The argument order of load has been changed",
    r"torch\.distributed is disabled, unavailable or uninitialized, assuming the intent is to load in a single process",
)


def apply_checkpoint_patches() -> None:
    """Install all of them; safe to call more than once."""
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
    """Stands for `write_preloaded_data_multiproc` (or multithread): same arguments and entry in `results`, no fork.

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
