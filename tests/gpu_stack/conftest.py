"""Tests of the GPU stack's real packages on a machine without a GPU: bash tests/gpu_stack.sh."""

from __future__ import annotations

import os

# The environment's own packages, none of which may find a GPU: the tests must see the same everywhere.
os.environ.update(CUDA_VISIBLE_DEVICES="", HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", TOKENIZERS_PARALLELISM="false")
