"""Adapt trained models to tasks, predict, and evaluate."""
