"""The response is the ground truth, character by character."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def exact(response: str, ground_truth: Any, extra_info: Mapping[str, Any]) -> float:
    """1.0 if the response equals the ground truth as a string, white space around both ignored; else 0.0."""
    return float(response.strip() == str(ground_truth).strip())
