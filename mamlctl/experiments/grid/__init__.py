"""Grids: many runs, and their table."""
