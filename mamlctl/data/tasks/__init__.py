"""Task number in, task out."""
