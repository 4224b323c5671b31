"""megatron-core itself: platform, parallel state, and what has to be patched."""
