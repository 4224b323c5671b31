"""What a run tells: metrics and their sinks, timing, live progress, and the report."""
