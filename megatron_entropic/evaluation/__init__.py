"""Evaluation from stored generations: statistics, tables, comparisons, pages. Nothing here generates or judges."""
