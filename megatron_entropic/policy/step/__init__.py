"""Computations of a rank: scores, losses, gradients, optimizer steps."""
