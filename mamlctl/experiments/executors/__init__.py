"""Executors, which run the cells of a grid."""
