"""The policy's half of bringing weights to the engines."""
