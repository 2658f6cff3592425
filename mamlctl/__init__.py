"""mamlctl: train, evaluate and compare MAML++ and its relatives from the command line."""

__version__ = "0.1.0"
