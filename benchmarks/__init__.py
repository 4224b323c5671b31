"""Measurements of the project against what other trainers run; `docs/performance.md` tells how to read them."""
