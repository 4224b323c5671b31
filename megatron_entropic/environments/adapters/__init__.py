"""Environments of other packages behind the three methods of `environments.base`, one file each."""
