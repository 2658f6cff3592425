"""The algorithms: a table, and one file for each method with code of its own."""
