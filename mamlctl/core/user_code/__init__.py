"""The user's own Python code: found, imported, stored in run folders, and trusted."""
