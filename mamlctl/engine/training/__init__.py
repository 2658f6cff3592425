"""Meta-steps, schedules, checkpoints and the training loop."""
