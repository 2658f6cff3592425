"""Several processes that share the tasks of one run."""
