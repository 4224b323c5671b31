"""Known messages are dropped one by one; everything else still reaches the user."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import logging, sys, warnings
from megatron_entropic.policy.megatron.platform import silence_known_noise
if sys.argv[1] == "silenced":
    silence_known_noise()
import megatron.core
from megatron.core.models.gpt import GPTModel
warnings.warn("Transformer Engine is on fire")
logger = logging.getLogger("megatron.core.tensor_parallel.random")
logger.warning("CPU RNG state changed within GPU RNG context")
logger.warning("CPU RNG state was stolen")
"""


def stderr_of(mode: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, timeout=300, check=True
    )
    return result.stderr


def test_only_news_is_left():
    left = [line for line in stderr_of("silenced").splitlines() if not line.startswith("  ")]
    assert left == ["<string>:8: UserWarning: Transformer Engine is on fire", "CPU RNG state was stolen"]


def test_without_the_filters_there_is_noise():
    text = stderr_of("loud")
    assert "Apex is not installed" in text
    assert "CPU RNG state changed" in text
