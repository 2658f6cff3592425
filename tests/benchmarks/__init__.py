"""How fast a meta-step is: `make bench`, or `PYTHONPATH=tests python -m benchmarks --help`."""
