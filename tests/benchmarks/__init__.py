"""Benchmarks of a meta-step: `make bench`, or `PYTHONPATH=tests python -m benchmarks --help`."""
