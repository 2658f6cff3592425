"""Data sets and task streams."""
