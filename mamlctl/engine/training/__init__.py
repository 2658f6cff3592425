"""Meta-steps, checkpoints and the training loop."""
