"""What a rank computes: scores, losses, gradients, optimizer steps."""
