"""Adapted models and their predictions."""
