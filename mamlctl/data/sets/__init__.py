"""The data sets: a table, and one file for each kind."""
