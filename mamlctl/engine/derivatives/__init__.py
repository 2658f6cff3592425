"""Losses with their first and second derivatives."""
