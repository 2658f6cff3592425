"""Streams of tasks: each task is a pure function of its number."""
