"""Entropy control inside trainers of others: one controller, one file for each host; torch and the host only."""
