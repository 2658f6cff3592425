"""Commands as functions: they return results and print nothing."""
