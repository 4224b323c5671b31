"""Records of a run: metrics and their sinks, rollouts, settings, timing and live progress."""
