"""The runs and tables in the folder of runs."""
