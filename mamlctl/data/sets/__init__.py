"""The data sets: a registry, and one file for each kind."""
