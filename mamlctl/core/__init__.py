"""Errors, events, results, formatting, files and statistics; no torch."""
