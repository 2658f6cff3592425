"""Data sets and streams of tasks."""
