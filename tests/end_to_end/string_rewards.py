"""A verifier that a nearly untrained model can please, so that a few steps have gradients."""

from __future__ import annotations

from typing import Any


def digit_share(response: str, ground_truth: Any, extra_info: dict[str, Any]) -> float:
    """Share of the response's characters that are digits, 0 for an empty response."""
    return sum(character.isdigit() for character in response) / max(1, len(response))
