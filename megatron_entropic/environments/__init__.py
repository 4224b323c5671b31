"""Conversations: what a model writes turn by turn, and what answers it in between."""
