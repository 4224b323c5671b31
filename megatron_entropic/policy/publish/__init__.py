"""The policy's side of bringing weights to the engines."""
