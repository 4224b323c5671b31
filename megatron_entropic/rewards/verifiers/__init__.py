"""Verifiers that come with the package, one file a subject."""
