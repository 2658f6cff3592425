"""The commands as functions, which return results and print nothing."""
