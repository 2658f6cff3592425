"""Runs on the user's own table: what they store about it, predictions for new tasks, and figures."""
