"""Another reward for the countdown task, so that a run can be disturbed by a change of what is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_entropic.rewards.verifiers.countdown import countdown


def with_product(response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """1 for a right answer that multiplies, else 0: half of the answers that the countdown verifier accepts.

    Args:
        response, ground_truth, extra_info: as for the countdown verifier.

    Raises:
        ValueError: see there.
    """
    return countdown(response, ground_truth, extra_info) if "*" in response else 0.0
