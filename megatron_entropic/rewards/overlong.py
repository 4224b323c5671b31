"""Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13)."""

from __future__ import annotations


def overlong_penalty(response_tokens: int, max_tokens: int, buffer_tokens: int) -> float:
    """0 up to `max_tokens` - `buffer_tokens`, from there linearly down to -1 at `max_tokens`, never below.

    Args:
        response_tokens: length of the response.
        max_tokens: L_max, the longest response there can be.
        buffer_tokens: L_cache, at least 1.
    """
    beyond = response_tokens - (max_tokens - buffer_tokens)
    return -min(max(beyond, 0) / buffer_tokens, 1.0)
