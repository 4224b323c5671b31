"""vLLM's log messages that say nothing about this program. By message, so that a new warning is seen."""

from __future__ import annotations

import logging
import re
import warnings

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


class _Drop(logging.Filter):
    """Rejects the records whose message matches a pattern."""

    def __init__(self, pattern: str) -> None:
        super().__init__()
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.match(record.getMessage()) is None


def silence_known_noise() -> None:
    """Install the filters in this process, best before vLLM is imported; repeatable."""
    # vLLM's Triton wrapper looks at every attribute of every module that it finds.
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.reduce_op` is deprecated")
    for name, pattern in _KNOWN_NOISE.items():
        logger = logging.getLogger(name)
        if not any(isinstance(present, _Drop) for present in logger.filters):
            logger.addFilter(_Drop(pattern))
