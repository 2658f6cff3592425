"""The algorithms: a registry, and one module for each method that has code of its own."""
