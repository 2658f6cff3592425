"""Figures of runs and of tables."""
