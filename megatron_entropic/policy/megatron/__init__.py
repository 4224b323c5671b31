"""megatron-core itself: platform, parallel state, and patches."""
