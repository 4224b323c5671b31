"""State that a rank keeps: checkpoints, exports, memory handed to engines."""
