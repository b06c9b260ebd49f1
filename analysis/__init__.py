"""Reads result files only: comparisons, figures, reports."""
