"""Logs of training for other programs, written next to the display."""
