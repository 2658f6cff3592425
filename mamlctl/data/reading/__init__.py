"""Readers of untrusted archives, pickles and images."""
