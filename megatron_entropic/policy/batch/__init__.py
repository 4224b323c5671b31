"""Sequences packed into micro-batches and dealt to replicas."""
